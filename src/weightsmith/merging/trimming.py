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
    return _cuts_of_tensor(parameter, _of_tensor(parameter, densities))


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


def band_cuts(parameter: Parameter, bands: Sequence[tuple[int, int]]) -> tuple[Cuts, Cuts]:
    """For each model, the cuts that keep its `upper` and its `lower` largest entries of this tensor's change.

    Args:
        parameter: The tensor.
        bands: For each model `upper` and `lower`, 0 .. numel.

    Returns:
        The cuts of all `upper`, the cuts of all `lower`.
    """
    count = len(bands)
    samples = _sampled_bits(parameter, sample_of_tensor(parameter)) * 2
    numbers = [upper for upper, _ in bands] + [lower for _, lower in bands]
    selections = [Selection(n, parameter.numel, bits) for n, bits in zip(numbers, samples, strict=True)]
    cuts = _cuts_of_tensor(parameter, selections)
    return cuts[:count], cuts[count:]


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
    return deltas if cuts is None else trimmed(deltas, tile, cuts)


def trimmed(deltas: np.ndarray, tile: Tile, cuts: Cuts, outliers: Cuts | None = None) -> np.ndarray:
    """The changes of a tile, fp32 (T, n), with dropped entries at 0, in place.

    Args:
        deltas: The models' changes.
        tile: Where they are.
        cuts: What is kept.
        outliers: What of that is dropped all the same; nothing where None.
    """
    bits = _magnitudes(deltas, tile)
    words = deltas.view(np.int32)
    if outliers is not None:
        mask = tile.scratch.get("outliers", deltas.size, np.int32).reshape(deltas.shape)
        mask = keep_mask(bits, outliers, tile.start, mask)
        np.bitwise_and(words, np.invert(mask, out=mask), out=words)
    np.bitwise_and(words, keep_mask(bits, cuts, tile.start, bits), out=words)
    return deltas


def _of_tensor(parameter: Parameter, densities: Sequence[float]) -> list[Selection]:
    samples = _sampled_bits(parameter, sample_of_tensor(parameter))
    return [
        Selection(int(density * parameter.numel), parameter.numel, bits)
        for density, bits in zip(densities, samples, strict=True)
    ]


def sample_of_tensor(parameter: Parameter) -> int:
    """How many elements of a tensor are sampled for a selection in it."""
    return min(max(parameter.numel // _SAMPLE_ONE_IN, _SMALL), _SAMPLE_OF_TENSOR)


def _cuts_of_tensor(parameter: Parameter, selections: Sequence[Selection]) -> Cuts:
    while any(selection.cuts is None for selection in selections):
        scans = [selection.scan(parameter.numel) for selection in selections]
        _scan(parameter, selections, scans)
        for selection, scan in zip(selections, scans, strict=True):
            if selection.cuts is None:
                selection.finish([scan])
    return tuple(selection.cuts[0] for selection in selections if selection.cuts)


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
    """One pass for all selections; the models take turns where there are more of those."""
    for tile in parameter.tiles():
        flags = tile.scratch.get("flags", 2 * tile.numel, np.bool_).reshape(2, -1)
        bits = _magnitudes(tile.deltas(), tile)
        for place, (selection, scan) in enumerate(zip(selections, scans, strict=True)):
            if selection.cuts is None:
                scan.add(tile.start, bits[place % len(bits)], flags)


def _magnitudes(deltas: np.ndarray, tile: Tile) -> np.ndarray:
    bits = tile.scratch.get("bits", deltas.size, np.int32).reshape(deltas.shape)
    return magnitude_bits(deltas, bits)
