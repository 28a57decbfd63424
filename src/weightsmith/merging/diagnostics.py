"""What the inputs of a merge look like, layer by layer: how far each model moved, and whether they agree.

D_t is the change of model t from the base; a merge without a base measures from the mean of its models.

    relative_norm           |D_t| / |base|
    sign_conflict           of the entries that any model changed, the share where one fell and one rose
    weighted_sign_conflict  1 - sum |sum_t D_t| / sum sum_t |D_t|: share of the change a sum cancels
    cosine                  <D_s, D_t> / (|D_s| |D_t|)
    ranks, weights          what a spectral method used of each model, means over the matrices of a layer

Cost     One pass over all inputs in tiles: about 10 ns an element for three models on one core, and a few
         tiles of memory, whatever the model's size. NumPy only.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from weightsmith.errors import InputError
from weightsmith.merging.api import Config, plan_merge
from weightsmith.merging.parameter import Parameter, Scratch, Tile
from weightsmith.merging.plan import MergePlan, Output
from weightsmith.merging.sources import Origin
from weightsmith.merging.sums import piece_absolutes, piece_dots, total
from weightsmith.runs.environment import cores
from weightsmith.runs.progress import SILENT, Progress

T = TypeVar("T")


def diagnose(
    merge: Config | MergePlan,
    *,
    tensors: Mapping[str, Mapping[str, Any]] | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure the inputs of a merge; nothing is merged.

    Args:
        merge: A page's path, its content, or an opened plan (which stays open).
        tensors: `MergeReport.tensors` of the merge: adds the ranks and weights of spectral methods.
        threads: Worker threads; one a core by default. The numbers do not depend on it.
        progress: Told the elements measured.

    Returns:
        JSON-able: "models" (T labels), "reference" ("base" or "mean"), "layers" (a list: "layer" is its
        number, None for all that is outside of layers) and "model" (everything). Each layer holds
        "parameters", "relative_norm" [T], "sign_conflict", "weighted_sign_conflict" and "cosine" [T][T];
        with `tensors`, where there are matrices, also "full_rank", "ranks" [T] and "weights" [T]. None
        stands for what does not exist, as a direction of no change.

    Raises:
        PageError: the page is wrong.
        InputError: the merge stacks slices of layers, so that there are no models to compare throughout.
        CheckpointError: a model can't be read, or holds NaN or infinity.
    """
    if not isinstance(merge, MergePlan):
        with plan_merge(merge, threads=threads) as plan:
            return diagnose(plan, tensors=tensors, threads=threads, progress=progress)
    plan = merge
    if plan.config.stacked:
        raise InputError("a merge that stacks slices of layers has no models to compare layer by layer")
    parameters = [
        with_base(output, plan).parameter(plan.donor.config, plan.config.nan_policy)
        for output in plan.outputs
        if output.method is not None
    ]
    layers: dict[int | None, _Sums] = defaultdict(_Sums)
    all_sums = each_parameter(parameters, _measure, "diagnose", threads, progress)
    for parameter, sums in zip(parameters, all_sums, strict=True):
        layers[parameter.layer] += sums
        if tensors and parameter.name in tensors:
            layers[parameter.layer].add_report(tensors[parameter.name])
    everything = _Sums()
    for sums in layers.values():
        everything += sums
    order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    return {
        "models": list(parameters[0].models) if parameters else [],
        "reference": "base" if parameters and parameters[0].has_base else "mean",
        "layers": [{"layer": layer, **layers[layer].to_json()} for layer in order],
        "model": everything.to_json(),
    }


@dataclass
class _Sums:
    """Sums over entries that every measure is made of; adding two is measuring both.

    Attributes:
        entries: Number of entries.
        base: Sum of base^2.
        dots: (T, T) sums of D_s D_t.
        moved: Sum of all |D_t|.
        left: Sum of |sum_t D_t|.
        changed: Entries that any model changed.
        conflicts: Entries where one model went up and another down.
        matrices: Number of matrices a spectral method reported.
        reported: Its full rank, ranks and weights, times the matrices they are means over: (1 + T + T,).
    """

    entries: int = 0
    base: float = 0.0
    dots: np.ndarray = field(default_factory=lambda: np.zeros(()))
    moved: float = 0.0
    left: float = 0.0
    changed: int = 0
    conflicts: int = 0
    matrices: int = 0
    reported: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def __iadd__(self, other: _Sums) -> _Sums:
        for part in dataclasses.fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        return self

    def add_report(self, info: Mapping[str, Any]) -> None:
        """Count in what a spectral method reported of one tensor."""
        count = info["matrices"]
        self.matrices += count
        self.reported = self.reported + count * np.array(
            [info["full_rank"], *info["ranks"], *info["weights"]], float
        )

    def to_json(self) -> dict[str, Any]:
        """The measures."""
        norms = np.sqrt(np.atleast_1d(np.diagonal(np.atleast_2d(self.dots))))
        scale = np.outer(norms, norms)
        cosine = np.divide(self.dots, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
        values: dict[str, Any] = {
            "parameters": self.entries,
            "relative_norm": [_ratio(norm, np.sqrt(self.base)) for norm in norms],
            "sign_conflict": _ratio(self.conflicts, self.changed),
            "weighted_sign_conflict": _ratio(self.moved - self.left, self.moved),
            "cosine": [
                [None if np.isnan(x) else float(np.clip(x, -1.0, 1.0)) for x in row] for row in cosine
            ],
        }
        if self.matrices:
            means = (self.reported / self.matrices).tolist()
            count = len(norms)
            values["full_rank"] = means[0]
            values["ranks"], values["weights"] = means[1 : 1 + count], means[1 + count :]
        return values


def each_parameter(
    parameters: Sequence[Parameter],
    measure: Callable[[Parameter], T],
    label: str,
    threads: int | None,
    progress: Progress,
) -> list[T]:
    """What `measure` finds of each parameter, in order; each is measured by one worker."""
    local, lock = threading.local(), threading.Lock()
    progress.start(label, float(sum(parameter.numel for parameter in parameters)), "elements")

    def one(parameter: Parameter) -> T:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch()
        parameter.scratch = local.scratch
        found = measure(parameter)
        with lock:
            progress.advance(float(parameter.numel))
        return found

    with ThreadPoolExecutor(max(1, threads or cores()), label) as pool:
        found = list(pool.map(one, parameters))
    progress.done()
    return found


def _measure(parameter: Parameter) -> _Sums:
    tasks = parameter.num_models
    sums = _Sums(entries=parameter.numel, dots=np.zeros((tasks, tasks)))
    pieces: dict[Any, list[np.ndarray]] = defaultdict(list)
    for tile in parameter.tiles():
        deltas = changes_of(tile)
        assert tile.base is not None
        pieces["base"].append(piece_dots(tile.base, tile.base, parameter))
        for s in range(tasks):
            for t in range(s, tasks):
                pieces[s, t].append(piece_dots(deltas[s], deltas[t], parameter))
        highest, lowest = tile.scratch.get("highest", tile.numel), tile.scratch.get("lowest", tile.numel)
        highest[:], lowest[:] = deltas[0], deltas[0]
        for delta in deltas[1:]:
            np.maximum(highest, delta, out=highest)
            np.minimum(lowest, delta, out=lowest)
        up, down = highest > 0, lowest < 0
        sums.conflicts += int(np.count_nonzero(up & down))
        sums.changed += int(np.count_nonzero(up | down))
        for delta in deltas:
            pieces["moved"].append(piece_absolutes(delta, parameter, tile.scratch))
        for delta in deltas[1:]:
            deltas[0] += delta
        pieces["left"].append(piece_absolutes(deltas[0], parameter, tile.scratch))
    for s in range(tasks):
        for t in range(s, tasks):
            sums.dots[s, t] = sums.dots[t, s] = total(pieces[s, t])
    sums.base, sums.moved, sums.left = (total(pieces[key]) for key in ("base", "moved", "left"))
    return sums


def changes_of(tile: Tile, count: int | None = None) -> np.ndarray:
    """The models' buffers turned into changes; without a base the mean of the first `count` models (of all
    by default) takes its place.
    """
    if tile.base is None:
        mean = tile.scratch.get("mean", tile.numel)
        models = tile.models[:count]
        mean[:] = models[0]
        for model in models[1:]:
            mean += model
        mean /= np.float32(len(models))
        tile.base = mean
    return tile.deltas()


def with_base(output: Output, plan: MergePlan) -> Output:
    """The output measured from the page's base even where the method (`linear`) does not use it."""
    if output.base is not None or plan.config.base is None:
        return output
    info = plan.donor.tensors.get(output.spec.name)
    if info is None or info.shape != output.spec.shape:
        return output
    return dataclasses.replace(output, base=Origin(plan.donor, info))


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


__all__ = ["diagnose"]
