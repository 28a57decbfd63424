"""A checkpoint's folder pruned into another one: load, find masks, write.

Cost  The model in float32 while masks are found (MaskPro: a second copy of what is pruned and a logit a
      weight); the output is written tensor by tensor from the source's files.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression.nm.batches import causal_loss, to_device
from weightsmith.compression.nm.maskpro import MaskProPruner, MaskProReport
from weightsmith.compression.nm.oneshot import Masks, one_shot, prune_, unchanged
from weightsmith.compression.nm.options import (
    Export,
    MagnitudeOptions,
    MaskProConfig,
    NMOptions,
    SparseGPTOptions,
    SparseSwapsOptions,
    WandaOptions,
)
from weightsmith.compression.nm.packed import check_targets
from weightsmith.compression.nm.semi_structured import sparse_library
from weightsmith.compression.nm.stored import stored_parts
from weightsmith.compression.nm.targets import dense_stacks, find_targets, some
from weightsmith.compression.nm.write import write_pruned
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.progress import SILENT, Progress


@dataclass(frozen=True)
class PruneReport:
    """What pruning a checkpoint did.

    Attributes:
        path: The finished folder.
        method: Id of the method.
        pattern: N:M.
        parameters: Weights of the model.
        pruned: Weights of the matrices that were pruned.
        layers: Of each of them its `shape`, the share of its squared norm that the mask keeps (`kept_norm`),
            and with MaskPro the share of its groups whose mask is not the first one (`changed`).
        seconds: Time taken, writing included.
        losses: With MaskPro the mean loss on the calibration batches, by name: of the `dense` model, of
            one-shot masks, of the `first` mask and of the final one (`maskpro`).
        absent: Why a one-shot mask is not among them, by name.
        learning: What MaskPro did; None for one-shot methods.
        packed_by: Library that the matrices were also packed for; None where they were not.
    """

    path: Path
    method: str
    pattern: str
    parameters: int
    pruned: int
    layers: Mapping[str, Mapping[str, Any]]
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    learning: MaskProReport | None = None
    packed_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the record of a run; without the path. Numbers that are not finite are None."""
        facts = dataclasses.asdict(self)
        del facts["path"]
        return _plain(facts)


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    options: NMOptions,
    batches: Sequence[Mapping[str, Any]] = (),
    *,
    data: Sequence[str] = (),
    device: str = "auto",
    work: str | Path | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
    export: Export = "dense",
) -> PruneReport:
    """Prune the model of a folder into the folder `out`: dense tensors with zeros, masks beside them.

    Args:
        source: Folder or hub id of a causal language model.
        out: Folder to make; it appears whole or not at all.
        options: Which method, with its settings.
        batches: Calibration data as the model takes them, "input_ids" and "labels" (B, L); not needed for
            magnitude.
        data: What the batches were made of, for the record.
        device: Where the model runs: "auto", "cpu" or "cuda".
        work: Folder for MaskPro's state; a run that was killed goes on from it to the same bits.
        progress: Told about blocks or steps.
        overwrite: Replace `out` when it exists and is a checkpoint.
        export: "semi-structured" also packs the pruned matrices for sparse tensor cores, which needs a CUDA
            device; see `load_semi_structured`.

    Raises:
        CheckpointError: the model can't be read, stores its weights so that no mask fits them (said before
            anything is computed), or `out` exists.
        InputError: nothing to prune, or what can't be; no data where data are needed; matrices that can't be
            packed, said before anything is computed.
        SystemFault: the disk is full or failed.
    """
    from weightsmith.evaluation.models import load_model

    begun = time.perf_counter()
    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(f"{out}: exists already; choose another output or pass --overwrite")
    library = sparse_library() if export == "semi-structured" else None
    model, _ = load_model(source, device=device)
    targets = find_targets(model, options)
    if stacks := dense_stacks(model, options):
        warnings.warn(
            f"stacks of matrices that stay dense: {some(stacks)}; `experts` prunes what it names, with the "
            "axis of the inputs",
            stacklevel=2,
        )
    with Checkpoint.open(source) as checkpoint:  # what can't be written is said before the work
        stored_parts(checkpoint, {target.name: target.parameter.to("meta") for target in targets})
        if library is not None:
            check_targets(targets, checkpoint, options)
    learning: MaskProReport | None = None
    losses: dict[str, float] = {}
    absent: dict[str, str] = {}
    if isinstance(options, MaskProConfig):
        pruner = MaskProPruner(model, options)
        learning = pruner.fit(batches, work=work, progress=progress)
        masks = pruner.masks()
    else:
        masks = prune_(model, batches, options, progress=progress)
    moved = isinstance(options, SparseGPTOptions) and options.update
    weights = dict(model.named_parameters()) if moved else {}
    with Checkpoint.open(source) as checkpoint:
        write_pruned(
            checkpoint,
            masks,
            out,
            method=options.kind,
            parameters={**_changed(options), "data": list(data), **_shape(batches)},
            seed=(options.seed or 0) if isinstance(options, MaskProConfig) else None,
            first=options.masks if isinstance(options, MaskProConfig) else None,
            weights={name: weights[name] for name in masks} if moved else None,
            overwrite=overwrite,
            library=library,
        )
        layers = _layers(checkpoint, masks, learning)
        total = sum(info.numel for info in checkpoint.tensors.values())
    if learning is not None:
        # Only now: what was learnt is safe, and comparing takes as long as pruning by all these ways.
        losses, absent = _losses(model, batches, options, progress)
        losses |= {"first": learning.first_loss, "maskpro": learning.final_loss}
    return PruneReport(
        path=Path(out),
        method=options.kind,
        pattern=options.pattern,
        parameters=total,
        pruned=sum(mask.kept.numel() for mask in masks.values()),
        layers=layers,
        seconds=time.perf_counter() - begun,
        losses=losses,
        absent=absent,
        learning=learning,
        packed_by=library,
    )


def _changed(options: NMOptions) -> dict[str, Any]:
    """Options that are not the defaults, and the pattern, as JSON values; the seed has a place of its own,
    and so has a file of masks, wherever it lay.
    """
    said = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "seed"}
    if isinstance(options, MaskProConfig) and options.masks is not None:
        said["init"] = "masks"
    default = type(options)()
    kept = {name: value for name, value in said.items() if value != getattr(default, name)}
    return {"pattern": options.pattern} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()
    }


def _shape(batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How much calibration data there was, as options would say it."""
    if not batches:
        return {}
    rows = [batch["input_ids"].shape for batch in batches]
    return {
        "samples": sum(count for count, *_ in rows),
        "length": max(length for _, length in rows),
        "batch_size": rows[0][0],
    }


@torch.no_grad()
def _losses(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], options: NMOptions, progress: Progress
) -> tuple[dict[str, float], dict[str, str]]:
    """What MaskPro is compared with: mean loss of the dense model and of one-shot masks, on its batches.

    And why a mask is left out, where a method can't prune what MaskPro can.
    """
    targets = find_targets(model, options)
    device = targets[0].parameter.device

    def mean() -> float:
        each = [float(causal_loss(model, to_device(batch, device))) for batch in batches]
        return math.fsum(each) / len(each)

    shared = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(NMOptions)}
    ways = (MagnitudeOptions, WandaOptions, SparseSwapsOptions, SparseGPTOptions)
    absent: dict[str, str] = {}
    progress.start("comparing", 1 + len(ways), "masks")
    found = {"dense": mean()}
    progress.advance(1)
    for way in ways:
        with unchanged(targets):
            try:
                one_shot(model, targets, batches, way(**shared))
                found[way.kind] = mean()
            except InputError as problem:
                absent[way.kind] = str(problem)
        progress.advance(1)
    progress.done()
    return found, absent


def _plain(value: Any) -> Any:
    """The same without NaN and infinities, which JSON doesn't have."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layers(
    checkpoint: Checkpoint, masks: Masks, learning: MaskProReport | None
) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    stored = stored_parts(checkpoint, {name: mask.kept.detach().cpu() for name, mask in masks.items()})
    for name, mask in masks.items():
        total = kept = 0.0
        for key, part in stored[name].items():
            squares = np.square(checkpoint.read(key), dtype=np.float64)
            total += float(squares.sum())
            kept += float(squares[part.reshape(-1).numpy()].sum())
        layers[name] = {"shape": list(mask.kept.shape), "kept_norm": kept / total if total else 1.0}
        if learning is not None:
            layers[name]["changed"] = learning.changed_by_parameter[name]
    return layers
