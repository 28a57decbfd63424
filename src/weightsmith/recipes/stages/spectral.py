"""What a spectral merge costs, told without importing torch.

Element-wise merges try a small part of themselves out (`MergePlan.predict`); with a spectral method that
would cost a dry run torch's import, so the method's own count of operations is set against this machine's
speed instead.
"""

from __future__ import annotations

from weightsmith.merging import MergePlan
from weightsmith.merging.engine import whole_bytes
from weightsmith.recipes.stages.costs import TORCH_BYTES
from weightsmith.runs.environment import cores
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.speed import matmul_flops

# Factorisations reach this part of the speed of large products, and each matrix costs some calls.
_EFFICIENCY, _MATRIX_SECONDS, _ELEMENT_SECONDS = 0.45, 0.012, 1.5e-9


def predict_spectral(plan: MergePlan) -> Prediction:
    """Cost of a merge that factorises matrices, without its disk."""
    whole = [(p, m) for p, m in plan.parameters() if getattr(m, "spectral", False) and m.takes(p)]
    flops = sum(float(m.whole_flops(p.shape, p.num_models)) for p, m in whole)
    at_once = max(1, min(plan.threads or cores(), len(whole)))
    largest = sorted((whole_bytes(parameter, method) for parameter, method in whole), reverse=True)[:at_once]
    seconds = (flops / (matmul_flops() * _EFFICIENCY) + _MATRIX_SECONDS * len(whole)) / at_once
    return Prediction(TORCH_BYTES + sum(largest), 0, seconds + plan.read_bytes / 4 * _ELEMENT_SECONDS)
