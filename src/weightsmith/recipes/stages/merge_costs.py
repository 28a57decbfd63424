"""What a merge costs, told without importing torch.

Element-wise merges try a small part of themselves out (`MergePlan.predict`). With a spectral method that
would cost a dry run torch's import, so the method's own count of operations is set against this machine's
speed instead.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from weightsmith.evaluation.costs import TORCH_BYTES
from weightsmith.merging import MergePlan
from weightsmith.merging.engine import whole_bytes
from weightsmith.merging.parameter import TILE_ELEMENTS
from weightsmith.runs.environment import cores
from weightsmith.runs.memory import reset_peak, rss_bytes
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.speed import matmul_flops

# Resident set of a stage's process that has imported what merging needs and nothing else.
LIGHT_BYTES = 44_000_000
# Factorisations reach this part of the speed of large products, and each matrix costs some calls.
_EFFICIENCY, _MATRIX_SECONDS, _ELEMENT_SECONDS = 0.45, 0.012, 1.5e-9


def predict_merge(plan: MergePlan, *, diagnosed: bool) -> Prediction:
    """Cost of a merge in a stage's own process; its disk is exact.

    Args:
        plan: The merge.
        diagnosed: Whether the merge is measured layer by layer afterwards.
    """
    measuring = _diagnosis_bytes(plan) if diagnosed else 0
    if any(getattr(output.method, "spectral", False) for output in plan.outputs):
        cost = _predict_spectral(plan)
        return replace(cost, memory_bytes=cost.memory_bytes + measuring, disk_bytes=plan.disk_bytes)
    before = _planner_bytes()
    reset_peak()
    cost = plan.predict()
    return replace(cost, memory_bytes=LIGHT_BYTES + max(measuring, cost.memory_bytes - before))


@functools.cache
def _planner_bytes() -> int:
    """Resident set of this process before it tried out its first merge."""
    return rss_bytes()


def _diagnosis_bytes(plan: MergePlan) -> int:
    """Tiles that the workers of a diagnosis hold: of the base, of each model, and for sums."""
    largest = max(output.spec.numel for output in plan.outputs)
    models = max(len(output.models) for output in plan.outputs)
    return (plan.threads or cores()) * (models + 7) * 4 * min(largest, TILE_ELEMENTS)


def _predict_spectral(plan: MergePlan) -> Prediction:
    whole = [(p, m) for p, m in plan.parameters() if getattr(m, "spectral", False) and m.takes(p)]
    flops = sum(float(m.whole_flops(p.shape, p.num_models)) for p, m in whole)
    at_once = max(1, min(plan.threads or cores(), len(whole)))
    largest = sorted((whole_bytes(parameter, method) for parameter, method in whole), reverse=True)[:at_once]
    seconds = (flops / (matmul_flops() * _EFFICIENCY) + _MATRIX_SECONDS * len(whole)) / at_once
    return Prediction(TORCH_BYTES + sum(largest), 0, seconds + plan.read_bytes / 4 * _ELEMENT_SECONDS)
