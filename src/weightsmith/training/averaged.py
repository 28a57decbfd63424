"""An average of states by a method and with data as a page or a command line names them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.averaging.options import LEARNED
from weightsmith.training.averaging.run import AverageReport, average_run
from weightsmith.training.parts import StateAverage

HELD_OUT_BATCHES = 32
"""Batches of held-out windows that SeWA goes through again and again."""


def thinned(states: Sequence[Any], last: int | None, every: int | None) -> list[Any]:
    """Each `every`-th state, counted back from the latest, and of those the latest `last`."""
    return list(states)[:: -(every or 1)][:last][::-1]


def average_states(
    folders: Sequence[str | Path],
    out: str | Path,
    average: StateAverage,
    *,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> AverageReport:
    """Choose among states and write their mean, as `average_run`, with held-out data by name.

    Args:
        folders: Checkpoint folders of one run.
        out: Folder to write.
        average: The method, its options and its data.
        steps: Training step of each; the number at the end of its name when left out.
        dtype: Of the float tensors written; the last state's when left out.
        batch_size: Held-out windows of a pass.
        device: Where losses are measured: `auto` (CUDA where there is one) or a torch device.
        seed: Of what is random in the choice.
        threads: Worker threads of the sum.
        progress: Told the bytes written.
        overwrite: Replace `out` when it exists.

    Raises:
        InputError: too few states, or no data for a method that measures a loss.
        CheckpointError: a state can't be read, they don't fit each other, or `out` exists.
    """
    options = seeded(average, seed).options
    measured: dict[str, Any] = {}
    if options.method in LEARNED:
        measured = _measured(Path(folders[-1]), average, batch_size, device, seed)
        measured["in_memory"] = fits_in_memory(folders[-1], len(folders))
    return average_run(
        folders,
        out,
        options,
        steps=steps,
        dtype=dtype,
        threads=threads,
        progress=progress,
        overwrite=overwrite,
        **measured,
    )


def seeded(average: StateAverage, seed: int) -> StateAverage:
    """The same with all randomness from a run's seed."""
    sewa = dataclasses.replace(average.options.sewa, seed=derive(seed, "sewa"))
    options = dataclasses.replace(average.options, seed=derive(seed, "average"), sewa=sewa)
    return dataclasses.replace(average, options=options)


def fits_in_memory(state: str | Path, number: int) -> bool:
    """Whether `number` such states in float32 fill at most half of what is free now."""
    with Checkpoint.open(state) as checkpoint:
        needed = number * 4 * sum(info.numel for info in checkpoint.tensors.values())
    return needed <= 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measured(last: Path, average: StateAverage, batch_size: int, device: str, seed: int) -> dict[str, Any]:
    """Model and batches that losses are measured with."""
    if average.held_out is None:
        raise InputError(
            f"held_out: {average.options.method} measures losses; name data that is not reported on"
        )
    from weightsmith.evaluation.models import load_model, window_length
    from weightsmith.training.data import held_out_batches

    model, tokenizer = load_model(last, device=device, dtype="float32")
    batches = held_out_batches(
        average.held_out,
        tokenizer,
        length=window_length(model.config.to_dict()),
        batch_size=batch_size,
        batches=max(average.options.batches, HELD_OUT_BATCHES),
        seed=derive(seed, "held out"),
    )
    model.config.use_cache = False
    return {"model": model, "batches": batches}
