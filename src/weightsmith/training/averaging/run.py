"""Average a list of checkpoint folders: choose, then stream the mean into a new folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints import Checkpoint, Lineage
from weightsmith.errors import InputError, require
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.training.averaging.candidates import open_candidates
from weightsmith.training.averaging.choice import Selection, by_rule
from weightsmith.training.averaging.options import LEARNED, AveragingOptions
from weightsmith.training.averaging.streaming import write_average

if TYPE_CHECKING:
    from torch import nn

    from weightsmith.training.averaging.objective import Loss

log = logging.getLogger(__name__)

SELECTION_FILE = "weightsmith/selection.json"
"""Which candidates an average was made of and why, inside its folder."""


@dataclass(frozen=True)
class AverageReport:
    """What `average_run` did.

    Attributes:
        out: The folder written.
        selection: The candidates averaged.
    """

    out: Path
    selection: Selection


def average_run(
    folders: Sequence[str | Path | Checkpoint],
    out: str | Path,
    options: AveragingOptions | None = None,
    *,
    steps: Sequence[int] | None = None,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    in_memory: bool = False,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
    **keywords: Any,
) -> AverageReport:
    """Choose among checkpoints of one run and write their mean, which never loads more than a few tiles of
    them.

    Rules (uniform, lawa, every, random, ema) need no torch and no model. Methods that measure a loss read the
    candidates tile by tile at each iteration, or from memory with `in_memory`.

    Args:
        folders: Checkpoint folders of one run.
        out: Folder to write.
        options: Settings; keywords of `AveragingOptions` may be given instead.
        steps: Training step of each folder; the number at the end of its name when left out.
        model: To measure losses with; the last candidate as a causal language model when left out.
        batches: What losses are measured on, readable again and again.
        loss: Of the model on a batch; the one a Hugging Face model returns by default.
        in_memory: Keep all candidates in memory (fp32) while choosing.
        dtype: Of the float tensors written (`BF16`, ...); the last candidate's when left out.
        threads: Worker threads of the sum; one a core when left out.
        progress: Told the bytes written.
        overwrite: Replace `out` when it exists.

    Raises:
        InputError: too few candidates, or no data for a method that measures a loss.
        CheckpointError: a folder can't be read, the candidates don't fit each other, or `out` exists.
        SystemFault: no space, no permission.
    """
    if options is not None and keywords:
        raise InputError(f"give `options` or keywords, not both: {', '.join(keywords)}")
    options = options if options is not None else AveragingOptions(**keywords)
    checkpoints, numbers = open_candidates(folders, steps)
    try:
        if options.method in LEARNED:
            selection = _learned(options, checkpoints, numbers, model, batches, loss, in_memory)
        else:
            selection = by_rule(options, numbers)
        if any(name.endswith("running_mean") for name in checkpoints[-1].tensors):
            log.warning(
                "the mean of batch normalisation's running statistics is not that of the mean model: "
                "make them anew with torch.optim.swa_utils.update_bn"
            )
        chosen = dict(zip(selection.steps, selection.weights, strict=True))
        weights = [chosen.get(number, 0.0) for number in numbers]
        written = write_average(
            checkpoints,
            out,
            weights,
            lineage=lineage_of(options, selection),
            side_files={SELECTION_FILE: selection_bytes(selection)},
            dtype=dtype,
            threads=threads,
            progress=progress,
            overwrite=overwrite,
        )
        return AverageReport(written, selection)
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()


def lineage_of(options: AveragingOptions, selection: Selection) -> Lineage:
    """What `weightsmith.json` says of an average."""
    parameters: dict[str, Any] = {
        "method": options.method,
        "steps": list(selection.chosen_steps),
        "weights": [weight for weight in selection.weights if weight > 0],
    }
    if options.method == "sewa":
        sewa = dataclasses.asdict(options.sewa)
        parameters["sewa"] = {**sewa, "temperature": list(options.sewa.temperature)}
    seeds = {"sewa": options.sewa.seed, "random": options.seed}
    return Lineage("average", parameters, seeds.get(options.method))


def selection_bytes(selection: Selection) -> bytes:
    """The record of a choice as JSON; numbers that are none become null."""
    plain = json.loads(json.dumps(selection.to_json()), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2, allow_nan=False).encode() + b"\n"


def _learned(
    options: AveragingOptions,
    checkpoints: Sequence[Checkpoint],
    steps: Sequence[int],
    model: nn.Module | None,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    in_memory: bool,
) -> Selection:
    from weightsmith.training.averaging.folders import FolderBank
    from weightsmith.training.averaging.objective import model_loss
    from weightsmith.training.averaging.search import select

    if batches is None:
        raise InputError(
            f"{options.method} measures losses: give `batches` (held-out data, not what is reported on)"
        )
    if model is None:
        require("transformers", extra="hf", needed_by=options.method)
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoints[-1].path, dtype=torch.float32)
    bank = FolderBank(checkpoints, steps)
    return select(options, bank.in_memory(model) if in_memory else bank, model, batches, loss or model_loss)
