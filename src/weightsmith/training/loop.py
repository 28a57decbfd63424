"""The loop behind the stages `train` and `finetune`: the Hugging Face Trainer, made resumable to the bit.

A run continues from its last durable checkpoint (weights, AdamW's moments, schedule, random states; the data
needs no state, see `data.py`) and reaches the weights of an undisturbed run bit for bit, on the CPU with the
same number of threads. A checkpoint is saved under a scratch name, flushed and renamed, so a torn one is
never seen.

Differences from a plain Trainer, each for that reason: weights in a durable checkpoint keep their names in
memory (the Trainer saves a mixture's experts under other names than it then loads, and silently starts them
anew), the data order is the data set's own, and a loss that is no number ends the run.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.lineage import read_lineage
from weightsmith.errors import CheckpointError, InputError, require
from weightsmith.evaluation.models import (
    choose_device,
    first_line,
    intra_op_threads,
    load_tokenizer,
    register_architecture,
    without_bars,
)
from weightsmith.runs.atomic import read_json, read_lines, sync_folder, system_faults, write_bytes, write_json
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.averaged import HELD_OUT_BATCHES
from weightsmith.training.config import FinetuneConfig, TrainConfig
from weightsmith.training.data import collate, held_out_batches, mixture
from weightsmith.training.planning import TrainPlan, plan
from weightsmith.training.states import PREFIX as STATE

STAMP = "run.json"  # in a work folder: which run it belongs to


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        checkpoint: The folder written.
        steps: Optimiser steps.
        tokens: Tokens of all windows.
        seconds: Seconds of training, attempts that were killed included.
        loss: Mean loss over the last steps that were logged together.
        resumed_from: The step this call continued from; 0 when it started at the beginning.
    """

    checkpoint: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    resumed_from: int


def train(
    config: TrainConfig,
    model: str | Path,
    out: str | Path,
    *,
    workdir: str | Path,
    seed: int = 0,
    metrics: str | Path | None = None,
    states: str | Path | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> TrainResult:
    """Train a model from random weights.

    Args:
        config: How.
        model: `testbed/<size>`, a folder with `config.json` and a tokenizer, or a hub id.
        out: Folder to write; it appears when it is complete.
        workdir: Folder for durable checkpoints; call again with the same one to continue a killed run. What
            another run left there is deleted.
        seed: Decides initial weights, data order and everything else that is random.
        metrics: Where to write metrics; `metrics.jsonl` in `workdir` by default. Beside it lie the history of
            AlphaDecay (`alphadecay.jsonl`) and the choice that averaging made (`selection.json`).
        states: Where states are kept with `average.keep`; `states` in `workdir` by default.
        progress: Told about each step.
        overwrite: Replace `out` when it exists.

    Raises:
        InputError: a value out of range, unusable data, or a loss that is no number.
        CheckpointError: the model can't be read, or `out` exists.
        SystemFault: no space, no permission.
        MissingExtraError: transformers is not installed.

    Example:
        >>> config = TrainConfig(data="docs", steps=2, batch_size=1)
        >>> train(config, "testbed/xs", tmp_path / "model", workdir=tmp_path / "work").steps
        2
    """
    if isinstance(config, FinetuneConfig):
        raise InputError("train takes a TrainConfig; a FinetuneConfig is for finetune")
    return _run(config, model, out, workdir, seed, metrics, states, progress, overwrite)


def finetune(
    config: FinetuneConfig,
    model: str | Path,
    out: str | Path,
    *,
    workdir: str | Path,
    seed: int = 0,
    metrics: str | Path | None = None,
    states: str | Path | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> TrainResult:
    """Train a model further from its weights; arguments and errors as `train`.

    The result stores the same tensors in the same dtypes as `model`, whatever the arithmetic in between.
    """
    if not isinstance(config, FinetuneConfig):
        raise InputError("finetune takes a FinetuneConfig; a TrainConfig starts from random weights")
    return _run(config, model, out, workdir, seed, metrics, states, progress, overwrite)


def _run(
    config: TrainConfig,
    model: str | Path,
    out: str | Path,
    workdir: str | Path,
    seed: int,
    metrics: str | Path | None,
    states: str | Path | None,
    progress: Progress,
    overwrite: bool,
) -> TrainResult:
    require("transformers", extra="hf", needed_by="training")
    require("accelerate", extra="hf", needed_by="training")
    planned = plan(config, model, seed=seed)
    out, workdir = Path(out), Path(workdir)
    file = Path(metrics) if metrics else workdir / "metrics.jsonl"
    kept = Path(states) if states else workdir / "states"
    with FolderLock(workdir), intra_op_threads(planned.config.threads or 1), without_bars():
        if out.exists() and not overwrite:
            return _finished(planned, out, workdir, file)
        _forget_other_runs(workdir, planned.fingerprint, file, kept)
        return _train(planned, out, workdir, file, kept, progress, overwrite)


def _train(
    planned: TrainPlan,
    out: Path,
    workdir: Path,
    metrics: Path,
    states: Path,
    progress: Progress,
    overwrite: bool,
) -> TrainResult:
    from weightsmith.training import assembly
    from weightsmith.training.averaging.callback import AveragingCallback
    from weightsmith.training.averaging.run import selection_bytes
    from weightsmith.training.callbacks import LayerDrop, Metrics
    from weightsmith.training.trainer import DurableTrainer, training_arguments
    from weightsmith.training.weights import write_model

    config = planned.config
    folder = _start_folder(planned, workdir)
    network = _network(planned, folder)
    length = config.sequence_length or 0
    tokens_per_step = _tokens_per_step(config)
    tokenizer = load_tokenizer(folder)
    vocabulary = network.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary}: they "
            "don't belong together"
        )
    examples = mixture(
        config.data,
        config.replay_data or (),
        config.replay,
        tokenizer=tokenizer,
        length=length,
        num_examples=config.steps * config.batch_size * config.gradient_accumulation,
        seed=derive(planned.seed, "data"),
    )
    held_out = _held_out(planned, tokenizer)
    reporter = Metrics(metrics, tokens_per_step, progress)
    # The layers are whole again before losses of averages are measured; the reporter tells what others log.
    callbacks: list[Any] = [LayerDrop(network, config.layer_drop, planned.seed)] if config.layer_drop else []
    callbacks += assembly.part_callbacks(
        planned,
        network,
        workdir=workdir,
        metrics=metrics,
        states=states,
        held_out=held_out,
        progress=progress,
    )
    callbacks.append(reporter)
    trainer = DurableTrainer(
        folder=workdir,
        keep=config.keep_checkpoints,
        model=network,
        args=training_arguments(config, workdir / ".scratch", derive(planned.seed, "trainer")),
        train_dataset=examples,
        data_collator=collate,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=assembly.optimizer_class(config),
        decay=assembly.decay_options(config),
    )
    last = trainer.last_durable()
    progress.start("training", config.steps, "steps")
    with system_faults(workdir):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    progress.done()
    for callback in callbacks:
        if isinstance(callback, AveragingCallback) and callback.selection is not None:
            write_bytes(metrics.with_name(assembly.SELECTION), selection_bytes(callback.selection))
    write_model(
        network,
        out,
        planned.specs,
        side_files=planned.side_files,
        lineage=planned.lineage,
        source=planned.model if planned.from_weights else None,
        overwrite=overwrite,
    )
    trainer.forget()
    shutil.rmtree(workdir / assembly.CANDIDATES, ignore_errors=True)
    return TrainResult(
        checkpoint=out,
        steps=config.steps,
        tokens=config.steps * tokens_per_step,
        seconds=round(reporter.seconds, 3),
        loss=reporter.loss,
        resumed_from=int(last.name.rpartition("-")[2]) if last else 0,
    )


def _finished(planned: TrainPlan, out: Path, workdir: Path, metrics: Path) -> TrainResult:
    """The result of this very run when `out` is it: a run may be killed after its result appeared.

    Raises:
        CheckpointError: `out` is something else.
    """
    lineage = read_lineage(out)
    ours = lineage is not None and dataclasses.replace(lineage, content=None) == planned.lineage
    if not ours or not _was_here(workdir, planned.fingerprint):
        raise CheckpointError(f"{out}: exists already; nothing was trained (overwrite replaces it)")
    last = (read_lines(metrics) or [{"seconds": 0.0, "loss": math.nan}])[-1]
    return TrainResult(
        checkpoint=out,
        steps=planned.config.steps,
        tokens=planned.config.steps * _tokens_per_step(planned.config),
        seconds=last["seconds"],
        loss=last["loss"],
        resumed_from=planned.config.steps,
    )


def _tokens_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation * (config.sequence_length or 0)


def _start_folder(planned: TrainPlan, workdir: Path) -> Path:
    """The folder with the starting model's config and tokenizer; those of a test-bed model are written
    first.
    """
    if planned.model is not None:
        return planned.model
    folder = workdir / "start"
    for name, content in planned.side_files.items():
        write_bytes(folder / name, content if isinstance(content, bytes) else content.read_bytes())
    return folder


def _network(planned: TrainPlan, folder: Path) -> Any:
    """The model in memory, float32, on its device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    register_architecture(planned.model_config)
    try:
        if planned.from_weights:
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            torch.manual_seed(derive(planned.seed, "weights"))
            network = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.float32
            )
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as problem:
        raise CheckpointError(
            f"{folder}: can't be loaded as a causal language model: {first_line(problem)}"
        ) from problem
    network.config.use_cache = False  # keys and values of a whole window would be kept for nothing
    return network.to(choose_device(planned.config.device))


def _held_out(planned: TrainPlan, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches to measure averages on; none where that is not asked for, or the training data is taken."""
    config, average = planned.config, planned.config.average
    if average is None or average.held_out is None or not average.measures:
        return []
    return held_out_batches(
        average.held_out,
        tokenizer,
        length=config.sequence_length or 0,
        batch_size=config.batch_size,
        batches=max(average.options.batches, HELD_OUT_BATCHES),
        seed=derive(planned.seed, "held out"),
    )


def _forget_other_runs(workdir: Path, fingerprint: str, metrics: Path, states: Path) -> None:
    """Start anew in a work folder where another run was: its checkpoints must not be taken for this one's."""
    from weightsmith.training.assembly import CANDIDATES, SELECTION
    from weightsmith.training.trainer import PREFIX

    if _was_here(workdir, fingerprint):
        return
    with system_faults(workdir):
        for folder in workdir.glob(f"{PREFIX}*"):
            shutil.rmtree(folder)
        for folder in (workdir / CANDIDATES, *states.glob(f"{STATE}*")):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (metrics, metrics.with_name(SELECTION)):
            file.unlink(missing_ok=True)
        sync_folder(workdir)
    write_json(workdir / STAMP, {"fingerprint": fingerprint})


def _was_here(workdir: Path, fingerprint: str) -> bool:
    """Whether the work folder belongs to the run with this fingerprint."""
    stamp = workdir / STAMP
    return stamp.exists() and read_json(stamp) == {"fingerprint": fingerprint}
