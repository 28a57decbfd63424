"""Pruning of a model in memory by what its layers see: all methods but MaskPro behind one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.compression.nm.batches import call
from weightsmith.compression.nm.calibrate import InputStatistics, calibrate
from weightsmith.compression.nm.magnitude import magnitude_scores
from weightsmith.compression.nm.masked import mask_of
from weightsmith.compression.nm.masks import codes_of_mask, codes_of_scores, expect_finite
from weightsmith.compression.nm.options import (
    MaskProConfig,
    NMOptions,
    RIAOptions,
    SparseGPTOptions,
    SparseSwapsOptions,
    WandaOptions,
)
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.compression.nm.ria import ria_scores
from weightsmith.compression.nm.sparsegpt import sparsegpt_prune
from weightsmith.compression.nm.sparseswaps import sparseswaps_mask
from weightsmith.compression.nm.targets import Target, find_targets
from weightsmith.compression.nm.wanda import wanda_scores
from weightsmith.errors import InputError
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.tensors.zeros import masked


@dataclass(frozen=True)
class Mask:
    """The mask of one parameter.

    Attributes:
        kept: bool, of the parameter's shape.
        pattern: N of M.
        dim: Axis of its inputs.
    """

    kept: Tensor
    pattern: Pattern
    dim: int


Masks = dict[str, Mask]
"""By the name of the parameter."""


def prune_(
    model: nn.Module,
    batches: Iterable[Any] = (),
    options: NMOptions | None = None,
    *,
    run: Callable[[nn.Module, Any], Any] = call,
    progress: Progress = SILENT,
) -> Masks:
    """Prune a model in place, in one pass.

    Args:
        model: Any module; a Hugging Face decoder is walked block by block, inputs of each from pruned blocks.
        batches: Calibration data: what the model is called with, in mappings, tuples or single tensors. Not
            needed for magnitude.
        options: `MagnitudeOptions`, `WandaOptions` (the default), `RIAOptions`, `SparseGPTOptions` or
            `SparseSwapsOptions`.
        run: Runs the model on a batch, for batches that the model can't be called with.
        progress: Told about blocks.

    Returns:
        The masks. All pruned weights are exactly 0. After an error some blocks may be pruned and others not.

    Raises:
        InputError: nothing to prune, or what can't be; no data where data are needed; weights or statistics
            that are not finite.
    """
    options = options or WandaOptions()
    if isinstance(options, MaskProConfig):
        raise InputError("MaskPro learns in steps: use MaskProPruner(model, config).fit(batches)")
    targets = find_targets(model, options)
    codes, _ = one_shot(model, targets, batches, options, run=run, progress=progress)
    return masks_of(targets, codes, options.nm)


@torch.no_grad()
def one_shot(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Any],
    options: NMOptions,
    *,
    run: Callable[[nn.Module, Any], Any] = call,
    progress: Progress = SILENT,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Prune `targets` in place.

    Returns:
        Their masks as integers, and the rows that each layer saw; none of these without data.

    Raises:
        InputError: see `prune_`.
    """
    for target in targets:  # all before the first is measured, whose inputs may come from another
        expect_finite(target.name, target.parameter)
    codes: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def prune(target: Target, statistics: InputStatistics | None) -> None:
        weight = target.parameter.data
        if isinstance(options, SparseGPTOptions):
            assert statistics is not None
            codes[target.name] = _sparsegpt(target, statistics, options)
        else:
            last = target.dim == weight.ndim - 1
            scores = _scores(weight if last else weight.mT, statistics, options)
            found = codes_of_scores(target.name, scores if last else scores.mT, options.nm, target.dim)
            if isinstance(options, SparseSwapsOptions):
                assert statistics is not None
                found = _sparseswaps(target, found, statistics, options)
            codes[target.name] = found
            weight.copy_(masked(weight, mask_of(codes[target.name], target, options.nm.m)))
        if statistics is not None:
            rows[target.name] = statistics.rows

    if options.statistics == "none":
        for target in targets:
            prune(target, None)
        return codes, rows
    with evaluating(model):
        calibrate(model, targets, batches, options.statistics, prune, run=run, progress=progress)
    return codes, rows


def _scores(weight: Tensor, statistics: InputStatistics | None, options: NMOptions) -> Tensor:
    """Scores of a weight whose inputs are on its last axis."""
    kind = options.init if isinstance(options, SparseSwapsOptions) else options.kind
    if kind == "magnitude":
        return magnitude_scores(weight)
    assert statistics is not None
    if kind == "ria":
        power = options.power if isinstance(options, RIAOptions) else RIAOptions.power
        return ria_scores(weight, statistics.norms, power)
    return wanda_scores(weight, statistics.norms)


def _sparseswaps(
    target: Target, codes: Tensor, statistics: InputStatistics, options: SparseSwapsOptions
) -> Tensor:
    """Better masks than `codes`."""
    weight, mask = target.parameter.data, mask_of(codes, target, options.nm.m)
    turned = target.dim != 1
    found = sparseswaps_mask(
        weight.t() if turned else weight,
        statistics.squares,
        mask.t() if turned else mask,
        options.nm.n,
        options.nm.m,
        sweeps=options.sweeps,
        name=target.name,
    )
    return codes_of_mask(target.name, found.t() if turned else found, options.nm, target.dim)


def _sparsegpt(target: Target, statistics: InputStatistics, options: SparseGPTOptions) -> Tensor:
    weight, n, m = target.parameter.data, options.nm.n, options.nm.m
    found = sparsegpt_prune(
        weight if target.dim == 1 else weight.t(),
        statistics.squares,
        n,
        m,
        block_size=options.block_size,
        damp=options.damp,
        name=target.name,
    )
    pruned, mask = (part if target.dim == 1 else part.t() for part in found)
    weight.copy_(pruned if options.update else masked(weight, mask))
    return codes_of_mask(target.name, mask, options.nm, target.dim)


def masks_of(targets: Sequence[Target], codes: Mapping[str, Tensor], pattern: Pattern) -> Masks:
    """Masks in the shape of their parameters."""
    return {
        target.name: Mask(mask_of(codes[target.name], target, pattern.m), pattern, target.dim)
        for target in targets
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        warnings.warn("the model is in training mode; it is run in eval mode here", stacklevel=3)
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unchanged(targets: Sequence[Target]) -> Iterator[None]:
    """Work on copies of the targets' weights; afterwards they are what and where they were."""
    kept = [(target.parameter, target.parameter.data) for target in targets]
    for parameter, data in kept:
        parameter.data = data.clone()
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
