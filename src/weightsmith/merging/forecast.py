"""What a merge will cost, from really doing a small part of it.

Time     A few parameters, cut to some tiles each, go through the engine into a real writer beside the output:
         reads, arithmetic, casts, checksums and writes at this machine's speed and present load. A handful of
         tiny tensors gives the cost of each tensor, spectral methods one small matrix the cost of an
         operation.
Memory   What the process holds after that, plus the matrices that are larger than those of the sample.
Disk     Exact: the layout is known.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import CheckpointWriter
from weightsmith.errors import SystemFault
from weightsmith.merging.engine import at_once_in_memory, execute, whole_bytes
from weightsmith.merging.parameter import TILE_ELEMENTS
from weightsmith.merging.plan import MergePlan, Output
from weightsmith.runs.environment import cores
from weightsmith.runs.memory import peak_rss_bytes
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import SILENT

_SAMPLES = 8
_SAMPLE_ELEMENTS = 8 * TILE_ELEMENTS
_TINY_ELEMENTS = 2048
# Operations of the largest matrix that is tried out: about a second's worth.
_TRIAL_FLOPS = 2e10


def forecast(plan: MergePlan) -> Prediction:
    """Predict memory, disk and time of `plan`.

    Raises:
        CheckpointError: NaN or infinity in a sampled weight.
        SystemFault: the place of the output can't be written to, or has no room for it.
    """
    begun = time.perf_counter()
    disk = plan.disk_bytes
    if plan.out is not None:
        free = shutil.disk_usage(_place(plan.out) or ".").free
        if free < disk:
            raise SystemFault(
                f"{plan.out}: needs {disk / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
                "nothing was written"
            )
    opening = time.perf_counter() - begun
    whole, tiled = _routes(plan.outputs)
    with tempfile.TemporaryDirectory(prefix=".weightsmith-forecast-", dir=_place(plan.out)) as folder:
        trial = _Trial(plan, Path(folder))
        seconds = trial.tiles(tiled)
        whole_seconds, extra = trial.matrices(whole) if whole else (0.0, 0)
        extra = max(extra, trial.survey_bytes(tiled))
    return Prediction(
        memory_bytes=peak_rss_bytes() + extra,
        disk_bytes=disk,
        seconds=opening + seconds + whole_seconds,
    )


class _Trial:
    """Runs parts of a plan into throw-away checkpoints and takes the time."""

    def __init__(self, plan: MergePlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._threads = plan.threads or cores()
        self._runs = 0

    def tiles(self, outputs: Sequence[Output]) -> float:
        """Seconds for all of these tensors, by tiles."""
        if not outputs:
            return 0.0
        by_size = sorted(outputs, key=lambda output: output.spec.numel)
        tiny = [_cut(output, _TINY_ELEMENTS) for output in by_size[:_SAMPLES]]
        self._run(tiny)  # imports and buffers, once
        at_once = self._run(tiny)
        for_tensors = at_once / len(tiny)
        to_fork = max(self._run(tiny, tile_elements=1) - at_once, 0.0)
        sample = [
            _cut(output, _SAMPLE_ELEMENTS) for output in _spread(by_size, max(_SAMPLES, 2 * self._threads))
        ]
        elements = sum(output.spec.numel for output in sample)
        # Other work on the machine only ever adds to a time, and this one is multiplied the most.
        seconds = min(self._run(sample) for _ in range(3))
        for_elements = max(seconds - to_fork - for_tensors * len(sample), 0.0) / max(elements, 1)
        all_elements = sum(output.spec.numel for output in outputs)
        return to_fork + for_tensors * len(outputs) + for_elements * all_elements

    def matrices(self, outputs: Sequence[Output]) -> tuple[float, int]:
        """Seconds for all of these tensors as whole matrices, and memory beyond that of the trial."""
        costs = [(_flops(output), output) for output in outputs]
        below = [pair for pair in costs if pair[0] <= _TRIAL_FLOPS]
        flops, output = (
            max(below, key=lambda pair: pair[0]) if below else min(costs, key=lambda pair: pair[0])
        )
        if flops > _TRIAL_FLOPS:
            output = _cut(output, output.spec.shape[-1] * 512)
            flops = _flops(output)
        # Where torch is not loaded yet, the merge too will have to load it: seconds that a small merge feels.
        to_start = self._run([_cut(output, output.spec.shape[-1] * 16)])
        rate = self._run([output]) / max(flops, 1.0)
        pairs = [(o.parameter(self._plan.donor.config), o.method) for o in outputs]
        at_once = min(at_once_in_memory(pairs), self._threads, len(pairs))
        tried = whole_bytes(output.parameter(self._plan.donor.config), output.method)
        largest = sorted((whole_bytes(*pair) for pair in pairs), reverse=True)[:at_once]
        extra = max(0, sum(largest) - tried)
        return to_start + sum(flops for flops, _ in costs) * rate / at_once, extra

    def survey_bytes(self, outputs: Sequence[Output]) -> int:
        """Memory that surveys of these tensors take, where a method says so; equal options are one method."""
        groups: dict[Any, list[Output]] = {}
        for output in outputs:
            if hasattr(output.method, "survey_bytes"):
                groups.setdefault(output.method, []).append(output)
        config = self._plan.donor.config
        return max(
            (
                method.survey_bytes([output.parameter(config) for output in group], self._threads)
                for method, group in groups.items()
            ),
            default=0,
        )

    def _run(self, outputs: Sequence[Output], tile_elements: int = TILE_ELEMENTS) -> float:
        self._runs += 1
        specs = [output.spec for output in outputs]
        begun = time.perf_counter()
        with CheckpointWriter(
            self._folder / str(self._runs), specs, side_files={}, lineage=self._plan.lineage
        ) as writer:
            execute(self._plan, outputs, writer, progress=SILENT, tile_elements=tile_elements)
            writer.commit()
        return time.perf_counter() - begun


def _routes(outputs: Sequence[Output]) -> tuple[list[Output], list[Output]]:
    """Outputs that go as whole matrices, and those that go in tiles."""
    whole, tiled = [], []
    for output in outputs:
        spectral = getattr(output.method, "spectral", False)
        (whole if spectral and output.method.takes(output.parameter({})) else tiled).append(output)
    return whole, tiled


def _spread(by_size: Sequence[Output], count: int) -> list[Output]:
    """`count` tensors at even steps of the elements, so that large ones count as they will."""
    total = sum(output.spec.numel for output in by_size)
    chosen: list[Output] = []
    passed = 0
    for output in by_size:
        passed += output.spec.numel
        if len(chosen) < count and passed * count >= (len(chosen) + 0.5) * total:
            chosen.append(output)
    return chosen


def _cut(output: Output, elements: int) -> Output:
    """The first rows of a tensor, about so many elements."""
    shape = output.spec.shape
    if output.spec.numel <= elements:
        return output
    row = shape[-1] if len(shape) >= 2 else 1
    rows = max(1, elements // row)
    cut = (rows, row) if len(shape) >= 2 else (rows,)
    return dataclasses.replace(output, spec=dataclasses.replace(output.spec, shape=cut))


def _flops(output: Output) -> float:
    count: Any = getattr(output.method, "whole_flops", None)
    if count is not None:
        return float(count(output.spec.shape, len(output.models)))
    rows, columns = sorted(output.spec.shape[-2:])
    return float(len(output.models)) * output.spec.numel / columns * columns * rows


def _place(out: Path | None) -> Path | None:
    """The nearest folder above the output that exists; the system's temporary one where none is known."""
    if out is None:
        return None
    place = out.absolute().parent
    while not place.is_dir():
        place = place.parent
    return place
