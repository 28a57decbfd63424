"""Base and fine-tunes from wherever they are: folders, hub ids, or models that are loaded already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.folder import label
from weightsmith.compression.tailoring.options import Compat, Edge
from weightsmith.errors import CheckpointError, InputError
from weightsmith.evaluation import load_model
from weightsmith.runs.memory import free_bytes
from weightsmith.tensors.floats import FLOAT_DTYPES, parse_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from weightsmith.compression.tailoring.pool import LayerPool

Source = Union[str, Path, "PreTrainedModel"]

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_SPAN = 64
_SAMPLED = 256
"""Values of a tensor that are looked at to know it again."""


@dataclass(frozen=True)
class Member:
    """A model of the family.

    Attributes:
        name: What to call it.
        path: Its folder or hub id; None for a model that is loaded.
        fingerprint: Of its content; empty for a model that is loaded.
    """

    name: str
    path: str | None
    fingerprint: str


def is_live(source: Source) -> bool:
    """Whether it is a loaded model."""
    return not isinstance(source, str | Path)


def members(base: Source, candidates: Sequence[Source]) -> list[Member]:
    """Names and fingerprints, the base first; headers are read and nothing else.

    Raises:
        CheckpointError: a folder is no sound checkpoint, or it is quantised.
        InputError: a model is given twice.
    """
    found: list[Member] = []
    for number, source in enumerate((base, *candidates)):
        if not isinstance(source, str | Path):
            found.append(Member(f"candidate {number}" if number else "base", None, ""))
            continue
        with Checkpoint.open(source) as checkpoint:
            if checkpoint.quantized:
                raise CheckpointError(
                    f"{checkpoint.name}: {checkpoint.quantized}; expected plain float weights"
                )
            name = label(Path(source)) if Path(source).is_dir() else checkpoint.name
            found.append(Member(name, str(source), checkpoint.fingerprint()))
    return _named_apart(found)


def _named_apart(found: Sequence[Member]) -> list[Member]:
    """Folders of one name are called by as many of their parents, too, as it takes to tell them apart."""
    longer = [_longer_names(member) for member in found]
    names = [member.name for member in found]
    while alike := [place for place, name in enumerate(names) if names.count(name) > 1]:
        if not any(longer[place] for place in alike):
            raise InputError(f"two models are called `{found[alike[0]].name}`: give each model once")
        for place in alike:
            if longer[place]:
                names[place] = longer[place].pop(0)
    return [replace(member, name=name) for member, name in zip(found, names, strict=True)]


def _longer_names(member: Member) -> list[str]:
    """Of a folder: with one parent, with two, ...; a loaded model and one of the hub have no other name."""
    if member.path is None or not Path(member.path).is_dir():
        return []
    parts = Path(os.path.abspath(member.path)).parts[1:]
    return ["/".join(parts[-length:]) for length in range(2, len(parts) + 1)]


def known_folder(source: Source) -> str | Path | None:
    """Where the files of a model are: what was given, or the folder that a loaded model came from, where that
    still is a sound checkpoint.
    """
    if isinstance(source, str | Path):
        return source
    name = getattr(source, "name_or_path", None)
    if not name or not Path(name).is_dir():
        return None
    try:
        with Checkpoint.open(name):
            return name
    except CheckpointError:
        return None


def holds(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether a loaded model has the content of a folder, by three spans of each tensor that both name."""
    import torch

    shared = 0
    for name, value in model.named_parameters():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != tuple(value.shape) or stored.dtype not in FLOAT_DTYPES:
            return False
        flat = value.detach().reshape(-1)
        for start in {0, stored.numel // 2, max(0, stored.numel - _SPAN)}:
            stop = min(start + _SPAN, stored.numel)
            ours = torch.from_numpy(checkpoint.read(name, start, stop)).to(value.dtype)
            if not ours.equal(flat[start:stop].cpu()):
                return False
        shared += 1
    return shared > 0


def sampled(model: Any) -> str:
    """What tells a loaded model from others, without reading all of it: names, shapes and some values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.named_parameters():
        some = value.detach().reshape(-1)[:: max(1, value.numel() // _SAMPLED)].float().cpu()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def torch_name(dtype: str) -> str:
    """Torch's name of a float dtype as people write it (`bf16`, `BF16`). Raises as `parse_dtype`."""
    return _TORCH_NAMES[parse_dtype(dtype)]


def open_pool(
    base: Source,
    candidates: Sequence[Source] = (),
    *,
    edge: Edge = "follow",
    compat: Compat = "own",
    cache_bytes: int = 1 << 30,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[LayerPool, Any]:
    """The pool of layers, and the tokenizer of the base where it came from a folder.

    Args:
        base: Folder, hub id, or loaded model.
        candidates: Its fine-tunes.
        edge: As in `LayerPool`.
        compat: As in `LayerPool`.
        cache_bytes: As in `LayerPool`.
        device: For what is loaded: "auto" or a torch device.
        dtype: For what is loaded: "auto" (float32 on the CPU) or a torch dtype's name.

    Raises:
        CheckpointError: a folder is no sound checkpoint, or it is quantised.
        InputError: the models don't fit one another, or into memory; a dtype that weights can't have.
    """
    from weightsmith.compression.tailoring.pool import LayerPool

    if dtype != "auto":
        dtype = torch_name(dtype)
    known = members(base, candidates)
    _check_memory([member.path for member in known if member.path], device, dtype)
    tokenizer, models = None, []
    for source in (base, *candidates):
        if not isinstance(source, str | Path):
            models.append(source)
            continue
        model, words = load_model(source, device=device, dtype=dtype)
        tokenizer = words if not models else tokenizer
        models.append(model)
    names = [member.name for member in known]
    pool = LayerPool(models[0], models[1:], names=names, edge=edge, compat=compat, cache_bytes=cache_bytes)
    return pool, tokenizer


def _check_memory(paths: Sequence[str], device: str, dtype: str) -> None:
    """Refuse before anything is loaded what memory can't hold."""
    if device not in ("auto", "cpu"):
        return
    import torch

    if device == "auto" and torch.cuda.is_available():
        return
    needed = 0
    for path in paths:
        with Checkpoint.open(path) as checkpoint:
            # On the CPU "auto" is float32.
            size = {"auto": 4, "float32": 4, "float64": 8}.get(dtype, 2)
            needed += sum(size * info.numel for info in checkpoint.tensors.values())
    free = free_bytes()
    if needed > free:
        raise InputError(
            f"the pool of {len(paths)} models takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "take fewer candidates, or dtype bfloat16"
        )
