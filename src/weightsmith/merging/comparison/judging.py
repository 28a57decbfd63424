"""One result of a merge against the base and every model: how far it went, and whose way.

R is the result's change from the base, D_t that of model t (from the mean of the models where there is no
base), |base| the norm of what they are measured from.

    relative_norm   |R| / |base|                 distance to the base
    distances       |R - D_t| / |base|           distance to each model
    cosine          <R, D_t> / (|R| |D_t|)
    against         of the entries that R and D_t both change, the share where they go opposite ways
    layers          relative_norm of each layer

Results are compared with one another in a sample of R: every k-th entry of the whole model, k a prime, so
that no column is left out; all entries where there are no more than the sample holds.

Cost     One pass over base, models and result in tiles; NumPy only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.merging.config import Input, MergeConfig
from weightsmith.merging.diagnostics import changes_of, each_parameter, with_base
from weightsmith.merging.parameter import Parameter
from weightsmith.merging.plan import MergePlan, open_plan
from weightsmith.merging.sums import piece_dots, total
from weightsmith.runs.progress import SILENT, Progress

SAMPLED_ENTRIES = 1 << 20
"""Entries of the sample, at most."""


@dataclass
class _Sums:
    base: float
    result: float
    models: np.ndarray  # (T, 5): D_t^2, R D_t, (R - D_t)^2, entries both change, those of opposite signs
    sample: np.ndarray


def judge(
    reference: MergeConfig,
    result: str | Path,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    sampled: int = SAMPLED_ENTRIES,
) -> tuple[dict[str, Any], np.ndarray]:
    """Measure one result.

    Args:
        reference: The plain mean of the models, with the base beside it.
        result: The merged checkpoint.
        threads: Workers at once.
        progress: Told the elements measured.
        sampled: Entries of the sample, at most.

    Returns:
        The measures (see the top), and the sample of R: fp32, the same entries for every result.

    Raises:
        CheckpointError: NaN or infinity in the result, or it has other tensors than the models.
    """
    (part,) = reference.slices
    inputs = (*part.inputs, Input(str(result), keys=part.keys))
    config = dataclasses.replace(reference, slices=(dataclasses.replace(part, inputs=inputs),))
    with open_plan(config) as plan:
        parameters = _parameters(plan)
        starts = list(itertools.accumulate((p.numel for p in parameters), initial=0))
        step = _step(starts[-1], sampled)
        firsts = {p.name: -start % step for p, start in zip(parameters, starts, strict=False)}
        sums = each_parameter(
            parameters,
            lambda parameter: _measure(parameter, firsts[parameter.name], step),
            "compare",
            threads,
            progress,
        )
    return _told(parameters, sums), np.concatenate([one.sample for one in sums])


def _parameters(plan: MergePlan) -> list[Parameter]:
    return [
        with_base(output, plan).parameter(plan.donor.config, plan.config.nan_policy)
        for output in plan.outputs
        if output.method is not None
    ]


def _step(entries: int, sampled: int) -> int:
    """A prime step that leaves no more than `sampled` of so many entries; 1 where all have room."""
    step = -(-entries // sampled)
    if step <= 1:
        return 1
    while any(step % divisor == 0 for divisor in range(2, math.isqrt(step) + 1)):
        step += 1
    return step


def _measure(parameter: Parameter, first: int, step: int) -> _Sums:
    tasks = parameter.num_models - 1
    pieces: dict[Any, list[np.ndarray]] = defaultdict(list)
    signs = np.zeros((tasks, 2))
    sample = []
    for tile in parameter.tiles():
        deltas = changes_of(tile, tasks)
        assert tile.base is not None
        result = deltas[tasks]
        pieces["base"].append(piece_dots(tile.base, tile.base, parameter))
        pieces["result"].append(piece_dots(result, result, parameter))
        sample.append(result[(first - tile.start) % step :: step].copy())
        product, way = (tile.scratch.get(key, tile.numel) for key in ("product", "way"))
        np.sign(result, out=way)
        for t in range(tasks):
            pieces[t, 0].append(piece_dots(deltas[t], deltas[t], parameter))
            pieces[t, 1].append(piece_dots(result, deltas[t], parameter))
            # Signs and not products: those of two small changes are 0 in fp32.
            np.sign(deltas[t], out=product)
            product *= way
            signs[t] += np.count_nonzero(product), np.count_nonzero(product < 0)
            np.subtract(result, deltas[t], out=product)
            pieces[t, 2].append(piece_dots(product, product, parameter))
    models = np.array([[total(pieces[t, k]) for k in range(3)] + signs[t].tolist() for t in range(tasks)])
    return _Sums(
        total(pieces["base"]),
        total(pieces["result"]),
        models,
        np.concatenate([np.empty(0, np.float32), *sample]),
    )


def _told(parameters: Sequence[Parameter], sums: Sequence[_Sums]) -> dict[str, Any]:
    layers: dict[int | None, list[_Sums]] = defaultdict(list)
    for parameter, one in zip(parameters, sums, strict=True):
        layers[parameter.layer].append(one)
    base = sum(one.base for one in sums)
    result = sum(one.result for one in sums)
    own, dots, apart, both, against = np.sum([one.models for one in sums], axis=0).T
    return {
        "relative_norm": _root(result, base),
        "distances": [_root(value, base) for value in apart],
        "cosine": [
            float(np.clip(dot / math.sqrt(norm * result), -1, 1)) if norm * result > 0 else None
            for dot, norm in zip(dots, own, strict=True)
        ],
        "against": [
            float(part / whole) if whole else None for part, whole in zip(against, both, strict=True)
        ],
        "layers": [
            {
                "layer": layer,
                "relative_norm": _root(
                    sum(one.result for one in layers[layer]), sum(one.base for one in layers[layer])
                ),
            }
            for layer in sorted(layers, key=lambda layer: (layer is None, layer or 0))
        ],
    }


def cosines(samples: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Cosine of every two samples; None where one is all zeros."""
    norms = [math.sqrt(float(np.dot(one, one.astype(np.float64)))) for one in samples]
    found: list[list[float | None]] = [[None] * len(samples) for _ in samples]
    for i, one in enumerate(samples):
        exact = one.astype(np.float64)
        for j in range(i, len(samples)):
            if norms[i] * norms[j] > 0:
                cosine = float(np.clip(np.dot(samples[j], exact) / (norms[i] * norms[j]), -1, 1))
                found[i][j] = found[j][i] = cosine
    return found


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole > 0 else None
