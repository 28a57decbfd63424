"""The weighted mean of checkpoint folders as a new folder: one pass, a few tiles of memory, no torch.

Memory   Two tiles for each worker, whatever the size and number of the checkpoints.
Numbers  Summed in fp32 in the order of the candidates, divided or scaled as `merge` with `linear` does it,
         cast
         once: the same bits. Integer tensors are the last candidate's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.environment import cores, versions
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.tensors.blend import scaled
from weightsmith.tensors.floats import FLOAT_DTYPES
from weightsmith.training.averaging.candidates import check_alike

TILE_ELEMENTS = 262_144


def write_average(
    checkpoints: Sequence[Checkpoint],
    out: str | Path,
    weights: Sequence[float],
    *,
    lineage: Lineage | None = None,
    side_files: Mapping[str, bytes] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> Path:
    """Write `sum_i weights[i] * checkpoint_i / sum(weights)` as a checkpoint folder.

    Args:
        checkpoints: States of one run, oldest first.
        out: Folder to write; it appears when it is complete.
        weights: One for each; those of weight 0 are not read.
        lineage: Recorded in `weightsmith.json`; its inputs are filled in.
        side_files: Written beside those of the last candidate.
        dtype: Of the float tensors (`BF16`, ...); those of the last candidate when left out.
        threads: Worker threads; one a core when left out.
        progress: Told the bytes written.
        overwrite: Replace `out` when it exists.

    Raises:
        CheckpointError: the candidates don't fit each other, hold NaN or infinity, or `out` exists.
        InputError: a weight too few or too many, or weights that sum to 0.
        SystemFault: no space, no permission.
    """
    planned = plan_average(checkpoints, weights, lineage, side_files or {}, dtype)
    used = [(c, float(w)) for c, w in zip(checkpoints, weights, strict=True) if w != 0]
    specs = planned.specs
    with CheckpointWriter(
        out, specs, side_files=planned.side_files, lineage=planned.lineage, overwrite=overwrite
    ) as writer:
        job = _Job(used, checkpoints[-1], writer, progress)
        progress.start("average", sum(spec.nbytes for spec in specs), "B")
        largest_first = sorted(specs, key=lambda spec: -spec.nbytes)
        with ThreadPoolExecutor(threads or cores()) as pool:
            for _ in pool.map(job.tensor, largest_first):
                pass
        progress.done()
        return writer.commit()


@dataclass(frozen=True)
class AveragePlan:
    """The folder that `write_average` would write: its tensors, other files and lineage."""

    specs: tuple[TensorSpec, ...]
    side_files: Mapping[str, Path | bytes]
    lineage: Lineage


def plan_average(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    lineage: Lineage | None,
    side_files: Mapping[str, bytes],
    dtype: str | None,
) -> AveragePlan:
    """What would be written; arguments and errors as `write_average`."""
    if len(weights) != len(checkpoints) or not checkpoints:
        raise InputError(f"expected a weight for each of {len(checkpoints)} candidates, got {len(weights)}")
    if not np.all(np.isfinite(weights)) or sum(weights) == 0:
        raise InputError(f"weights must be finite and not sum to 0, got {list(weights)}")
    check_alike(checkpoints)
    last = checkpoints[-1]
    used = [(c, float(w)) for c, w in zip(checkpoints, weights, strict=True) if w != 0]
    specs = tuple(
        TensorSpec(name, dtype if dtype and info.dtype in FLOAT_DTYPES else info.dtype, info.shape)
        for name, info in last.tensors.items()
    )
    record = lineage or Lineage("average", {"weights": [weight for _, weight in used]})
    inputs = tuple(Ancestor.of(checkpoint, "candidate") for checkpoint, _ in used)
    record = Lineage(record.method, record.parameters, record.seed, inputs, record.versions or versions())
    return AveragePlan(specs, {**last.side_file_map(), **side_files}, record)


class _Job:
    """What the workers share."""

    def __init__(
        self,
        used: Sequence[tuple[Checkpoint, float]],
        last: Checkpoint,
        writer: CheckpointWriter,
        progress: Progress,
    ) -> None:
        self._used, self._last, self._writer, self._progress = used, last, writer, progress
        self._total = sum(weight for _, weight in used)
        self._equal = len({weight for _, weight in used}) == 1
        self._local = threading.local()
        self._lock = threading.Lock()

    def tensor(self, spec: TensorSpec) -> None:
        """One tensor, tile by tile."""
        if spec.dtype not in FLOAT_DTYPES:
            self._writer.write_raw(spec.name, self._last.read_raw(spec.name))
            self._advance(spec.nbytes)
            return
        for start in range(0, spec.numel, TILE_ELEMENTS):
            stop = min(start + TILE_ELEMENTS, spec.numel)
            self._writer.write(spec.name, self._mean(spec.name, start, stop), start)
            self._advance((stop - start) * spec.nbytes / spec.numel)

    def _mean(self, name: str, start: int, stop: int) -> np.ndarray:
        total, one = (buffer[: stop - start] for buffer in self._buffers())
        for index, (checkpoint, weight) in enumerate(self._used):
            values = one if index else total
            checkpoint.read(name, start, stop, values)
            if not self._equal:
                scaled(values, weight, self._total)
            if index:
                np.add(total, one, out=total)
        if self._equal:
            scaled(total, 1.0, len(self._used))
        if total.size and not (total.max() < np.inf and total.min() > -np.inf):
            self._blame(name, start, stop)
        return total

    def _blame(self, name: str, start: int, stop: int) -> None:
        for checkpoint, _ in self._used:
            if not np.isfinite(checkpoint.read(name, start, stop)).all():
                raise CheckpointError(
                    f"{checkpoint.name}: {name} holds NaN or infinity; leave this candidate out. "
                    "Nothing was written."
                )
        raise CheckpointError(f"{name}: the weighted sum overflows float32. Nothing was written.")

    def _buffers(self) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = np.empty(TILE_ELEMENTS, np.float32), np.empty(TILE_ELEMENTS, np.float32)
        return self._local.buffers

    def _advance(self, size: float) -> None:
        with self._lock:
            self._progress.advance(size)
