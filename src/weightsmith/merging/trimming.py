"""Trimming of task vectors to their largest entries, of each tensor or of each whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.merging.parameter import ParallelMap, Parameter, Tile
from weightsmith.tensors.selection import Cut, Selection, keep_mask, magnitude_bits

# One in so many elements of a tensor is sampled for its bracket, at most so many for a tensor and a model.
# More of them narrow the bracket (fewer elements to collect) but cost reading and a partition; here both
# are small.
_SAMPLE_ONE_IN = 64
_SAMPLE_OF_TENSOR = 1 << 18
_SAMPLE_OF_MODEL = 1 << 20
_SMALL = 1 << 12

Cuts = tuple[Cut, ...]


def tensor_cuts(parameter: Parameter, densities: Sequence[float]) -> Cuts:
    """For each model, the cut that keeps int(density * numel) entries of this tensor's change."""
    numel = parameter.numel
    selections = _of_tensor(parameter, densities)
    while any(selection.cuts is None for selection in selections):
        scans = [selection.scan(numel) for selection in selections]
        _scan(parameter, selections, scans)
        for selection, scan in zip(selections, scans, strict=True):
            if selection.cuts is None:
                selection.finish([scan])
    return tuple(selection.cuts[0] for selection in selections if selection.cuts)


def model_cuts(
    parameters: Sequence[Parameter], densities: Sequence[float], parallel: ParallelMap
) -> dict[str, Cuts]:
    """The same over all tensors of a model as one vector: int(density * all elements) are kept.

    Among equals the lower position wins: tensors in the order of `parameters`, then elements.
    """
    selections = _of_model(parameters, densities, parallel)
    while any(selection.cuts is None for selection in selections):

        def scan(parameter: Parameter) -> list:
            scans = [selection.scan(parameter.numel) for selection in selections]
            _scan(parameter, selections, scans)
            return scans

        by_parameter = parallel(scan, parameters)
        for index, selection in enumerate(selections):
            if selection.cuts is None:
                selection.finish([scans[index] for scans in by_parameter])
    cuts = [selection.cuts or [] for selection in selections]
    return {parameter.name: row for parameter, row in zip(parameters, zip(*cuts, strict=True), strict=True)}


def collected_bytes(
    parameters: Sequence[Parameter], densities: Sequence[float], threads: int, *, by_tensor: bool
) -> int:
    """Memory that the passes behind `tensor_cuts` or `model_cuts` will take beyond tiles, from samples."""
    if by_tensor:
        largest = sorted(parameters, key=lambda parameter: parameter.numel)[-threads:]
        selections = [one for parameter in largest for one in _of_tensor(parameter, densities)]
    else:
        selections = _of_model(parameters, densities, lambda work, some: [work(one) for one in some])
    return round(sum(4 * selection.expected for selection in selections))


def trimmed_deltas(tile: Tile, cuts: Cuts | None) -> np.ndarray:
    """The models' changes with dropped entries at 0, in place, fp32 (T, n); all where `cuts` is None."""
    deltas = tile.deltas()
    if cuts is None:
        return deltas
    bits = _magnitudes(deltas, tile)
    words = deltas.view(np.int32)
    np.bitwise_and(words, keep_mask(bits, cuts, tile.start, bits), out=words)
    return deltas


def _of_tensor(parameter: Parameter, densities: Sequence[float]) -> list[Selection]:
    numel = parameter.numel
    wanted = min(max(numel // _SAMPLE_ONE_IN, _SMALL), _SAMPLE_OF_TENSOR)
    return [
        Selection(int(density * numel), numel, bits)
        for density, bits in zip(densities, _sampled_bits(parameter, wanted), strict=True)
    ]


def _of_model(
    parameters: Sequence[Parameter], densities: Sequence[float], parallel: ParallelMap
) -> list[Selection]:
    numel = sum(parameter.numel for parameter in parameters)
    one_in = max(_SAMPLE_ONE_IN, -(-numel // _SAMPLE_OF_MODEL)) if numel > _SMALL else 1
    samples = parallel(lambda parameter: _sampled_bits(parameter, parameter.numel // one_in), parameters)
    return [
        Selection(int(density * numel), numel, np.concatenate([sample[index] for sample in samples]))
        for index, density in enumerate(densities)
    ]


def _sampled_bits(parameter: Parameter, numel: int) -> list[np.ndarray]:
    deltas = parameter.sample(numel).deltas()
    return list(magnitude_bits(deltas, np.empty(deltas.shape, np.int32)))


def _scan(parameter: Parameter, selections: Sequence[Selection], scans: Sequence) -> None:
    for tile in parameter.tiles():
        flags = tile.scratch.get("flags", 2 * tile.numel, np.bool_).reshape(2, -1)
        for bits, selection, scan in zip(_magnitudes(tile.deltas(), tile), selections, scans, strict=True):
            if selection.cuts is None:
                scan.add(tile.start, bits, flags)


def _magnitudes(deltas: np.ndarray, tile: Tile) -> np.ndarray:
    bits = tile.scratch.get("bits", deltas.size, np.int32).reshape(deltas.shape)
    return magnitude_bits(deltas, bits)
