"""What a comparison will take, told before it begins: each method's own prediction, and the whole."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.evaluation import check_tasks
from weightsmith.evaluation.costs import predict_scoring
from weightsmith.evaluation.tasks import Tasks
from weightsmith.merging.check import check
from weightsmith.merging.comparison.run import Keep, disk_bytes, open_variants
from weightsmith.merging.comparison.variants import PageLike, is_spectral
from weightsmith.merging.plan import open_plan
from weightsmith.registry import load
from weightsmith.runs.memory import reset_peak
from weightsmith.runs.prediction import Prediction

# One entry of one model in the pass that measures a result; starting a process.
_MEASURE_SECONDS, _START_SECONDS = 6e-9, 0.4
# Importing torch, where it can't be measured because it is imported already.
_TORCH_SECONDS = 2.0
# Characters and questions that `evaluate` reads of each task of the test-bed.
_CHARACTERS, _ITEMS = 20_000, 400


@dataclass(frozen=True)
class CostOfComparison:
    """What a comparison will take.

    Attributes:
        methods: Each method that can merge these models, and what its merge will take.
        whole: All of it: the largest memory, the disk at its fullest, the time with measuring and scoring.
        refused: Method -> why it can't.
        models: What is known of each model, as `merge --check` shows it.
        warnings: What the user should know.
    """

    methods: Mapping[str, Prediction]
    whole: Prediction
    refused: Mapping[str, str]
    models: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]


def predict_comparison(
    page: PageLike,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] = ("all",),
    tasks: Tasks | None = None,
    keep: Keep = "all",
    device: str = "auto",
    threads: int | None = None,
) -> CostOfComparison:
    """Predict a comparison by trying out a small part of every merge; arguments as `compare`.

    Raises:
        The same as `compare`, as far as headers and samples tell.
    """
    wanted = check_tasks(tasks) if tasks is not None else ()
    place = None if out is None else Path(out)
    opened = open_variants(page, place, methods, device)
    # What takes a base tells how far the models are from it.
    configs = [job.variant.config for job in opened.jobs]
    based = [one for one in configs if load(one.method, "merging").base == "required"]
    with open_plan(next(iter(based), opened.variants.reference)) as plan:
        found = check(plan)
    with open_plan(opened.variants.reference) as plan:
        sources = len(opened.inputs) + 1
        seconds = _MEASURE_SECONDS * opened.elements * (sources * (len(opened.jobs) + 1))
        donor = plan.donor.path
    costs: dict[str, Prediction] = {}
    torch_seconds = 0.0
    for job in opened.jobs:
        if is_spectral(job.method) and not torch_seconds:
            torch_seconds = _load_torch()
        # Each merge has a process of its own: what an earlier trial held is not this one's.
        reset_peak()
        target = None if place is None else place / job.method
        config = job.variant.config
        with open_plan(config, target, overwrite=True, threads=threads, device=device) as plan:
            costs[job.method] = plan.predict()
    memory = max(cost.memory_bytes for cost in costs.values())
    seconds += sum(cost.seconds + _START_SECONDS for cost in costs.values())
    seconds += torch_seconds * sum(is_spectral(job.method) for job in opened.jobs)
    if wanted:
        scoring = predict_scoring(donor, wanted, _CHARACTERS, _ITEMS)
        memory = max(memory, scoring.memory_bytes)
        seconds += (len(opened.jobs) + len(opened.inputs)) * scoring.seconds
    full = disk_bytes(opened.jobs, keep)
    kept = {"all": full, "best": disk_bytes(opened.jobs, "none"), "none": 0}[keep]
    return CostOfComparison(
        costs,
        Prediction(memory, kept, seconds, scratch_bytes=full - kept),
        opened.refused,
        found["models"],
        [*opened.warnings, *found["warnings"]],
    )


def _load_torch() -> float:
    """Seconds that it takes to import torch, which every process of a spectral method has to do."""
    if "torch" in sys.modules:
        return _TORCH_SECONDS
    begun = time.perf_counter()
    importlib.import_module("torch")
    return time.perf_counter() - begun
