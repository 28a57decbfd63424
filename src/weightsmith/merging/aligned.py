"""A checkpoint whose token rows stand in the order of another vocabulary, seen as an ordinary checkpoint.

Rule     Row r of a tensor over tokens is row own[r] of the stored one. Where own[r] is -1 the model lacks the
         token: the row is the mean of the rows that `Filler` names in other checkpoints, or a mean row, or
         zeros; the same values for every model that lacks it.
Reading  In blocks of rows: the rows a block needs are read in runs and brought into order by one `take`.
Cost     About that of a plain read where most tokens keep their order; memory of a few blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from weightsmith.checkpoints import Checkpoint, TensorInfo
from weightsmith.tensors.floats import BLOCK, DTYPE_BYTES, from_float32

_GAP = 4
"""Rows between two wanted ones that are read along rather than skipped: a read costs more than a few rows."""


class Filler:
    """Rows for tokens that a model lacks.

    Args:
        donors: Checkpoints, each with the number of its row for every output row, -1 for none; a row is the
            mean over the donors that have one, zeros where none has.
        mean_of: Where rows are filled by the mean row of a checkpoint's tokens: that checkpoint, its token
            rows, and which output rows (bool).
    """

    def __init__(
        self,
        donors: Sequence[tuple[Checkpoint, np.ndarray]],
        mean_of: tuple[Checkpoint, np.ndarray, np.ndarray] | None,
    ) -> None:
        self._donors = tuple(donors)
        self._mean_of = mean_of
        self._means: dict[str, np.ndarray] = {}

    def fill(self, name: str, wanted: np.ndarray, block: np.ndarray) -> None:
        """Put the values of output rows `wanted` into `block`, fp32 (len(wanted), width)."""
        block[:] = 0.0
        count = np.zeros(len(wanted), np.float32)
        for donor, rows in self._donors:
            has = rows[wanted] >= 0
            if has.any():
                found = np.empty((int(has.sum()), block.shape[1]), np.float32)
                _gather(donor, name, rows[wanted[has]], found)
                block[has] += found
                count[has] += 1.0
        several = count > 1.0
        block[several] /= count[several, None]
        if self._mean_of is not None:
            of_mean = self._mean_of[2][wanted]
            if of_mean.any():
                block[of_mean] = self._mean(name, block.shape[1])

    def _mean(self, name: str, width: int) -> np.ndarray:
        if name not in self._means:
            assert self._mean_of is not None
            checkpoint, rows, _ = self._mean_of
            total = np.zeros(width, np.float64)
            step = max(1, BLOCK // width)
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                found = np.empty((len(some), width), np.float32)
                _gather(checkpoint, name, some, found)
                total += found.sum(axis=0, dtype=np.float64)
            self._means[name] = (total / max(len(rows), 1)).astype(np.float32)
        return self._means[name]


class AlignedCheckpoint(Checkpoint):
    """`inner` with its token rows in another order; made by `vocabulary.align`.

    `tensors` tells the new shapes; only `read` and `read_raw` give the values. Closing it leaves `inner`
    open.

    Args:
        inner: The checkpoint.
        names: Its tensors whose first axis counts tokens.
        own: For every output row the row of `inner`, -1 where it has none.
        filler: Gives the rows it has not.
    """

    def __init__(self, inner: Checkpoint, names: Sequence[str], own: np.ndarray, filler: Filler) -> None:
        self.inner = inner
        self._aligned = frozenset(names)
        self._own = own
        self._filler = filler
        tensors: Mapping[str, TensorInfo] = {
            name: dataclasses.replace(info, shape=(len(own), *info.shape[1:]))
            if name in self._aligned
            else info
            for name, info in inner.tensors.items()
        }
        super().__init__(
            inner.path,
            inner.name,
            config=inner.config,
            side_files=inner.side_file_map(),
            files=inner._files,
            tensors=tensors,
            descriptors=inner.descriptors(),
        )
        self.quantized = inner.quantized

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of the reordered tensor as float32; see `Checkpoint.read`."""
        stored = self.tied.get(name, name)
        if stored not in self._aligned:
            return self.inner.read(name, start, stop, out)
        info = self.tensors[stored]
        stop = info.numel if stop is None else stop
        if not 0 <= start <= stop <= info.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {info.numel}")
        values = np.empty(stop - start, np.float32) if out is None else out
        width = max(1, info.numel // max(info.shape[0], 1))
        step = max(1, BLOCK // width)
        row = start // width
        while row * width < stop:
            end = min(row + step, -(-stop // width))
            block = np.empty((end - row, width), np.float32)
            self._rows(stored, row, end, block)
            first, last = max(start, row * width), min(stop, end * width)
            values[first - start : last - start] = block.reshape(-1)[first - row * width : last - row * width]
            row = end
        return values

    def read_raw(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of the reordered tensor, rounded to its dtype; see `Checkpoint.read_raw`."""
        stored = self.tied.get(name, name)
        if stored not in self._aligned:
            return self.inner.read_raw(name, start, stop, out)
        info = self.tensors[stored]
        stop = info.numel if stop is None else stop
        size = DTYPE_BYTES[info.dtype]
        raw = np.empty((stop - start) * size, np.uint8) if out is None else out
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            cast = from_float32(self.read(stored, first, last), info.dtype)
            raw[(first - start) * size : (last - start) * size] = cast.view(np.uint8)
        return raw

    def stores(self, name: str) -> bool:
        """Whether the tensor's bytes are as they are stored."""
        return self.tied.get(name, name) not in self._aligned and self.inner.stores(name)

    def like(self, other: Checkpoint, prefix: str) -> AlignedCheckpoint:
        """Another checkpoint whose tensors `prefix + name` have the rows of this one's, in the same order.

        Rows that this one lacks are zeros there: nothing is known of them.
        """
        names = [prefix + name for name in self._aligned if prefix + name in other.tensors]
        return AlignedCheckpoint(other, names, self._own, Filler((), None))

    def fingerprint(self, *, full: bool = False) -> str:
        """That of the checkpoint itself: how its rows were ordered is told in the output's lineage."""
        return self.inner.fingerprint(full=full)

    def close(self) -> None:
        """Nothing: `inner` belongs to whoever opened it."""

    def _rows(self, name: str, first: int, last: int, block: np.ndarray) -> None:
        rows = self._own[first:last]
        lacking = np.flatnonzero(rows < 0)
        if lacking.size == 0:
            _gather(self.inner, name, rows, block)
            return
        owned = np.flatnonzero(rows >= 0)
        if owned.size:
            found = np.empty((owned.size, block.shape[1]), np.float32)
            _gather(self.inner, name, rows[owned], found)
            block[owned] = found
        filled = np.empty((lacking.size, block.shape[1]), np.float32)
        self._filler.fill(name, lacking + first, filled)
        block[lacking] = filled


def _gather(checkpoint: Checkpoint, name: str, rows: np.ndarray, block: np.ndarray) -> None:
    """Stored rows `rows` of a tensor into `block`, fp32 (len(rows), width)."""
    width = block.shape[1]
    if len(rows) == int(rows[-1]) - int(rows[0]) + 1 and (np.diff(rows) == 1).all():
        start = int(rows[0]) * width
        checkpoint.read(name, start, start + block.size, block.reshape(-1))
        return
    wanted = np.unique(rows)
    cuts = np.flatnonzero(np.diff(wanted) > _GAP) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, cuts)]
    table = np.empty((sum(last - first for first, last in runs), width), np.float32)
    place, places = 0, np.empty(len(wanted), np.int64)
    for (first, last), run in zip(runs, np.split(np.arange(len(wanted)), cuts), strict=True):
        checkpoint.read(name, first * width, last * width, table[place : place + last - first].reshape(-1))
        places[run] = wanted[run] - first + place
        place += last - first
    np.take(table, places[np.searchsorted(wanted, rows)], axis=0, out=block)
