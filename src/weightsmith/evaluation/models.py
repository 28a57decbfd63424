"""A causal language model and its tokenizer from any Hugging Face folder, and the settings to run it with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.adapter import AdapterCheckpoint
from weightsmith.checkpoints.names import is_over_tokens
from weightsmith.errors import CheckpointError, InputError, require
from weightsmith.registry import load

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENED_BY = {"weightsmith/mediator.json": "mediator"}
"""A file beside weights -> the method that opens its folder; a plain loader would leave parts of it out."""

ARCHITECTURES = {"ztt": "ztt"}
"""`model_type` of an architecture of ours -> the method whose import registers it with the Auto classes."""

SMALL_MODEL = 10_000_000  # parameters; below, a second thread costs more than it brings


def load_model(
    source: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder or hub id, in evaluation mode.

    Args:
        source: Folder or hub id; an adapter's folder, or `model+adapter`, gives the model it stands for.
        device: "auto" (CUDA where there is one), or what `torch.device` takes.
        dtype: "auto" (float32 on the CPU, as stored elsewhere), or a torch dtype's name.

    Raises:
        CheckpointError: not a readable checkpoint of a causal language model, or without a tokenizer.
        InputError: no such device.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="hf", needed_by="evaluation")
    on = choose_device(device)
    wanted = ("float32" if on.type == "cpu" else "auto") if dtype == "auto" else dtype
    with Checkpoint.open(source) as checkpoint:  # a torn file is one clear line here, and forty in a loader
        plain = checkpoint.plain if isinstance(checkpoint, AdapterCheckpoint) else checkpoint
        folder, name, words = plain.path, checkpoint.name, tokenizer_folder(checkpoint)
        register_architecture(plain.config)
        for file, method in OPENED_BY.items():
            if (folder / file).is_file():
                return load(method).from_pretrained(folder, dtype=wanted).to(on), load_tokenizer(folder)
        with without_bars():
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
            except (OSError, ValueError, RuntimeError) as problem:
                raise CheckpointError(
                    f"{name}: can't be loaded as a causal language model: {first_line(problem)}"
                ) from problem
        if isinstance(checkpoint, AdapterCheckpoint):
            _adapt(model, checkpoint)
    return model.to(on).eval(), load_tokenizer(words)


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """Where the tokenizer of a model lies: an adapter may have none of its own."""
    files = checkpoint.side_file_map()
    marks = [file for name, file in files.items() if name.startswith(("tokenizer", "vocab", "spiece"))]
    return marks[0].parent if marks else checkpoint.path


def _adapt(model: PreTrainedModel, checkpoint: AdapterCheckpoint) -> None:
    """Give a loaded model the weights that an adapter makes of its own."""
    import torch

    rows = {checkpoint.tensors[name].shape[0] for name in checkpoint.changed if is_over_tokens(name)}
    embedding: Any = model.get_input_embeddings()
    if rows and min(rows) != embedding.weight.shape[0]:
        model.resize_token_embeddings(min(rows), mean_resizing=False)
    # Files of some families lack the model's own prefix.
    short = {name.removeprefix(f"{model.base_model_prefix}."): name for name, _ in model.named_parameters()}
    known = dict(model.named_parameters())
    for name in sorted(checkpoint.changed):
        parameter = known.get(name if name in known else short.get(name, name))
        shape = checkpoint.tensors[name].shape
        if parameter is None or tuple(parameter.shape) != tuple(shape):
            raise CheckpointError(
                f"{checkpoint.name}: changes `{name}`, which the loaded model has under no name of its own; "
                "expand it first: merge it alone by `passthrough`"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(checkpoint.read(name)).reshape(shape))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    transformers = require("transformers", extra="hf", needed_by="tokenizing")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{folder}: no tokenizer that loads: {first_line(problem)}") from problem


def register_architecture(config: Mapping[str, Any]) -> None:
    """Make the Auto classes know the architecture of a `config.json`, where it is one of ours."""
    if (method := ARCHITECTURES.get(str(config.get("model_type")))) is not None:
        load(method)


def choose_device(device: str = "auto") -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device here.
    """
    import torch

    try:
        chosen = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
    except RuntimeError as problem:
        raise InputError(f"device {device!r}: {first_line(problem)}") from problem
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine has no CUDA device")
    return chosen


def window_length(config: Mapping[str, Any]) -> int:
    """Tokens of one window for a model's `config.json`, in training and scoring alike: a quarter of the
    positions the model was made for, at most 1,024. Models without that number get 1,024.
    """
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings") or text.get("n_positions") or 4096
    return max(1, min(1024, int(positions) // 4))


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions that a model looks up in a table, past which it can't run (GPT-2, OPT, GPT-J); None where it
    computes them, as rotary ones mostly are, whatever number its config names.
    """
    from torch import nn

    text = model.config.get_text_config(decoder=True)
    named = getattr(text, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    # OPT and BioGPT leave rows before the first position.
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]
    # GPT-J and CodeGen store their angles, each layer its own.
    tables += [len(value) for name, value in model.named_buffers() if name.endswith(".embed_positions")]
    return named if named in tables else None


def default_threads(num_parameters: int) -> int:
    """Intra-op threads for a model: one for small ones, else every core this process may use."""
    from weightsmith.runs.environment import cores

    return 1 if num_parameters < SMALL_MODEL else cores()


@contextlib.contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Run torch with `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars inside the block."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def first_line(problem: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
