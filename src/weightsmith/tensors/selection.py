"""The k largest magnitudes of a stream, exactly and without a sort.

Problem  Trimming keeps the int(density * n) largest changes of a tensor, or of a whole model that does not
         fit into memory. Checkpoints in bfloat16 are full of equal and zero changes, so a mask
         `magnitude >= threshold` keeps too many: among equals, the lower index must win.
Method   The bits of a non-negative float order like the float, so magnitudes are compared as integers. A
         sample gives a bracket [low, high] that should hold the k-th largest. One pass counts what lies
         above and collects the few that lie inside, where counting and a partition end it. Where the
         bracket holds only a few distinct values, it counts each of them instead. When the bracket missed,
         or holds too much to keep, it is narrowed (by a coarse count of what it holds: 4,096 times at once)
         and the pass is made again: never more than five, whatever the data.
Result   A `Cut`: the k-th magnitude and, for equals, the tile and the count up to which they are kept.
Cost     About 0.6 ns per element and pass. Memory: at most `COLLECTED_ELEMENTS` values for each selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAGNITUDE_BITS = 0x7FFFFFFF
COLLECTED_ELEMENTS = 1 << 21
# Every part of a stream keeps such a count, and a model has hundreds.
_COARSE_BITS = 12
# Fewer bins where each of many small parts is counted into all of them.
_RANK_BITS = 11
# Half width of the sampled bracket in standard deviations of a quantile of independent draws. The sample
# comes in runs of neighbours, which are alike, so this is wider than independence would ask for.
_MARGIN = 5.0
# Up to this many distinct values in the bracket are counted one by one; so is a value that has this share of
# the bracket. Changes of bfloat16 weights come in few values: that saves collecting them.
_PROBES = 3
_LIKELY = 0.25
_ENOUGH = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements of one part (one tensor) belong to the k largest.

    Attributes:
        bits: Bits of the k-th largest magnitude, as an integer; larger ones are kept.
        start: Elements equal to it are kept in tiles that start before this index, dropped after it.
        count: How many equal elements, lowest index first, are kept in the tile that starts at `start`.
    """

    bits: int
    start: float
    count: int = 0


KEEP_NONE = Cut(MAGNITUDE_BITS, -1.0)
KEEP_ALL = Cut(0, float("inf"))


def magnitude_bits(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The bits of |values|: fp32 into int32 of the same shape."""
    return np.bitwise_and(values.view(np.int32), np.int32(MAGNITUDE_BITS), out=out)


def keep_mask(bits: np.ndarray, cuts: Sequence[Cut], start: int, out: np.ndarray) -> np.ndarray:
    """All-ones words where an element of the tile at `start` is kept, zero elsewhere.

    Args:
        bits: Magnitudes of the tile in T streams as int32 (T, n), from `magnitude_bits`.
        cuts: For each stream the cut of this tile's part.
        start: Where the tile starts in its part; tiles must be those of the scan.
        out: int32 (T, n); may be `bits`.
    """
    limits = np.array([[cut.bits - (start < cut.start)] for cut in cuts], np.int32)
    equals = [
        (row, np.flatnonzero(bits[row] == np.int32(cut.bits))[: cut.count])
        for row, cut in enumerate(cuts)
        if start == cut.start and cut.count
    ]
    # (limit - bits) is negative exactly where bits > limit; the shift spreads its sign over the word.
    np.subtract(limits, bits, out=out)
    np.right_shift(out, 31, out=out)
    for row, kept in equals:
        out[row, kept] = -1
    return out


class Scan:
    """One pass over one part of a stream. Belongs to one thread.

    It counts what equals each of a few probes, or what lies in a bracket [low, high] and collects that.
    """

    def __init__(self, probes: tuple[int, ...], low: int, high: int, limit: int) -> None:
        self.probes = probes
        self.low, self.high = low, high
        self.above = [0] * max(len(probes), 1)
        self.inside = 0
        self.tiles: list[tuple[int, list[int]]] = []
        self.collected: list[np.ndarray] | None = []
        self.coarse: np.ndarray | None = None
        self._limit = limit

    @property
    def shift(self) -> int:
        """How many low bits a coarse bin spans."""
        return max(0, (self.high - self.low).bit_length() - _COARSE_BITS)

    def add(self, start: int, bits: np.ndarray, flags: np.ndarray) -> None:
        """Take in the tile at `start`.

        Args:
            start: Index of its first element; tiles come in ascending order.
            bits: Magnitudes, int32 (n,). Left untouched.
            flags: Scratch, bool (2, n).
        """
        above, reached = flags
        for index, probe in enumerate(self.probes or (self.high,)):
            self.above[index] += int(np.count_nonzero(np.greater(bits, np.int32(probe), out=above)))
        if self.probes:
            equal = [np.count_nonzero(np.equal(bits, np.int32(probe), out=reached)) for probe in self.probes]
            self.tiles.append((start, list(map(int, equal))))
            return
        np.greater_equal(bits, np.int32(self.low), out=reached)
        # Twice as fast as a boolean index.
        inside = bits[np.flatnonzero(np.not_equal(above, reached, out=reached))]
        self.tiles.append((start, [inside.size]))
        if inside.size:
            np.subtract(inside, np.int32(self.low), out=inside)
            self._take(inside, inside.size)
        self.inside += inside.size

    def _take(self, offsets: np.ndarray, inside: int) -> None:
        if self.collected is not None:
            self.collected.append(offsets)
            if self.inside + inside <= self._limit:
                return
            offsets, self.collected = np.concatenate(self.collected), None
            self.coarse = np.zeros(1 << _COARSE_BITS, np.int64)
        assert self.coarse is not None
        self.coarse += np.bincount(offsets >> self.shift, minlength=self.coarse.size)

    def equals(self, threshold: int) -> list[tuple[int, int]]:
        """For each tile its start and how many of its elements equal `threshold`."""
        if self.probes:
            which = self.probes.index(threshold)
            return [(start, equal[which]) for start, equal in self.tiles]
        parts = iter(self.collected or ())
        return [
            (start, int(np.count_nonzero(next(parts) == threshold - self.low)) if inside else 0)
            for start, (inside,) in self.tiles
        ]


class Selection:
    """Finds the `count` largest magnitudes among `numel`, over as many passes as it takes (one or two).

    Use: until `cuts` is set, make one `scan` for each part, feed it every tile, give the scans to `finish` in
    the order of the parts. Parts in that order are one long stream to the lower-index rule.

    Args:
        count: How many to keep, 0 .. numel.
        numel: Elements of the stream.
        sample: Magnitude bits of some of its elements, int32; all of them, or a few thousand spread evenly.

    Attributes:
        cuts: The cut of each part, once known.
        expected: How many elements the first pass should collect.
    """

    def __init__(self, count: int, numel: int, sample: np.ndarray) -> None:
        self.count, self.numel = count, numel
        self.cuts: list[Cut] | None = None
        self.expected = 0.0
        self._probes: tuple[int, ...] = (0,)
        self._low, self._high = 0, MAGNITUDE_BITS
        if 0 < count < numel:
            self._aim(sample)

    def scan(self, numel: int) -> Scan:
        """An empty scan of a part of `numel` elements, for the next pass."""
        limit = max(COLLECTED_ELEMENTS * numel // max(self.numel, 1), 1024)
        return Scan(self._probes, self._low, self._high, limit)

    def finish(self, scans: Sequence[Scan]) -> list[Cut] | None:
        """Take one whole pass; returns (and keeps) the cut of each part once they are known."""
        if self.count == 0:
            self.cuts = [KEEP_NONE] * len(scans)
        elif self.count == self.numel:
            self.cuts = [KEEP_ALL] * len(scans)
        elif self._probes:
            self._narrow_by_probes(scans)
        else:
            self._narrow(scans)
        return self.cuts

    def _aim(self, sample: np.ndarray) -> None:
        """Probes where the sample's bracket holds few distinct values, else the bracket itself."""
        size = sample.size
        self._probes = ()
        if size == 0:
            return
        fraction = self.count / self.numel
        rank = float(self.count) if size == self.numel else fraction * size
        margin = 0.0 if size == self.numel else _MARGIN * (fraction * (1 - fraction) * size) ** 0.5 + 4
        first, last = size - int(rank + margin), size - int(rank - margin)
        ends = sorted({max(first, 0), min(last, size - 1)})
        bracket = np.sort(np.partition(sample, ends)[ends[0] : ends[-1] + 1])
        self._low = 0 if first < 0 else int(bracket[0])
        self._high = MAGNITUDE_BITS if last >= size else int(bracket[-1])
        self._probes = self._candidates(bracket, size - int(rank) - ends[0], complete=size == self.numel)
        if not self._probes:
            self.expected = min(bracket.size / size * self.numel, COLLECTED_ELEMENTS)

    def _candidates(self, bracket: np.ndarray, expected: int, *, complete: bool) -> tuple[int, ...]:
        """Values to count: all of a bracket that has few, or the expected one where it has many elements."""
        distinct, counts = np.unique(bracket, return_counts=True)
        if complete or (distinct.size <= _PROBES and bracket.size >= _ENOUGH):
            return tuple(map(int, distinct))
        value = bracket[min(max(expected, 0), bracket.size - 1)]
        share = int(counts[np.searchsorted(distinct, value)]) / bracket.size
        return (int(value),) if share >= _LIKELY and bracket.size >= _ENOUGH else ()

    def _narrow_by_probes(self, scans: Sequence[Scan]) -> None:
        low, high = self._low, self._high
        for index in reversed(range(len(self._probes))):
            probe = self._probes[index]
            rank = self.count - sum(scan.above[index] for scan in scans)
            equal = sum(found[index] for scan in scans for _, found in scan.tiles)
            if 0 < rank <= equal:
                self.cuts = _cuts(scans, probe, rank)
                return
            if rank <= 0:
                low = probe + 1
                break
            high = probe - 1
        # The probe was the bracket's end: beyond it nothing is known.
        if low > self._high:
            high = MAGNITUDE_BITS
        if high < self._low:
            low = 0
        self._probes, self._low, self._high = (low,) if low == high else (), low, high

    def _narrow(self, scans: Sequence[Scan]) -> None:
        above = sum(scan.above[0] for scan in scans)
        inside = sum(scan.inside for scan in scans)
        rank = self.count - above  # among those inside; 1 is the largest
        if rank <= 0:
            self._low, self._high = self._high + 1, MAGNITUDE_BITS
        elif rank > inside:
            self._low, self._high = 0, self._low - 1
        elif any(scan.coarse is not None for scan in scans):
            self._low, self._high = _coarse_bin(scans, rank)
        else:
            offset, rank = _ranked([part for scan in scans for part in scan.collected or ()], rank)
            self.cuts = _cuts(scans, self._low + offset, rank)
        if self._low == self._high:
            self._probes = (self._low,)


def largest(tiles: Iterable[np.ndarray], count: int, sample: np.ndarray | None = None) -> Cut:
    """The cut that keeps the `count` largest magnitudes of one array given in tiles.

    Args:
        tiles: fp32 arrays (any lengths), a list or anything else that can be gone through again.
        count: 0 .. number of elements.
        sample: Some of the elements, fp32; the first tile by default.

    Example:
        >>> cut = largest([np.float32([3, -1, 2, -2])], 2)
        >>> float(np.int32(cut.bits).view(np.float32)), cut.count
        (2.0, 1)
    """
    sizes = [tile.size for tile in tiles]
    if sample is None:
        sample = next(iter(tiles), np.empty(0, np.float32))
    selection = Selection(count, sum(sizes), np.abs(sample).view(np.int32))
    while selection.cuts is None:
        scan, start = selection.scan(sum(sizes)), 0
        for tile in tiles:
            bits = np.abs(tile).view(np.int32)
            scan.add(start, bits, np.empty((2, tile.size), np.bool_))
            start += tile.size
        selection.finish([scan])
    return selection.cuts[0]


def _ranked(parts: Sequence[np.ndarray], rank: int) -> tuple[int, int]:
    """The value of this rank (1 is the largest) among all parts, and its rank among its equals."""
    shift = max(0, max(int(part.max()) for part in parts).bit_length() - _RANK_BITS)
    # Counting in bins first is five times as fast as partitioning everything, and takes no copy of it.
    counts = np.zeros(1 << _RANK_BITS, np.int64)
    for part in parts:
        counts += np.bincount(part >> shift, minlength=counts.size)
    bin, above = _bin_of(counts, rank)
    values = np.concatenate([part[np.flatnonzero(part >> shift == bin)] for part in parts])
    rank -= above
    values.partition(values.size - rank)
    found = int(values[values.size - rank])
    return found, rank - int(np.count_nonzero(values > found))


def _coarse_bin(scans: Sequence[Scan], rank: int) -> tuple[int, int]:
    """The bracket of the coarse bin that holds this rank."""
    first = scans[0]
    counts = np.zeros(1 << _COARSE_BITS, np.int64)
    for scan in scans:
        if scan.coarse is not None:
            counts += scan.coarse
        for offsets in scan.collected or ():
            counts += np.bincount(offsets >> scan.shift, minlength=counts.size)
    low = first.low + (_bin_of(counts, rank)[0] << first.shift)
    return low, min(low + (1 << first.shift) - 1, first.high)


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds this rank, counted from the highest bin, and how many lie in bins above it."""
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, rank))
    return counts.size - 1 - at, int(from_top[at] - counts[counts.size - 1 - at])


def _cuts(scans: Sequence[Scan], threshold: int, equals: int) -> list[Cut]:
    """The cut of every part when `equals` of the elements equal to the threshold are to be kept."""
    cuts = []
    for scan in scans:
        cut = Cut(threshold, float("inf"))
        for start, here in scan.equals(threshold):
            if here >= equals and cut.start == float("inf"):
                cut = Cut(threshold, float(start), equals)
            equals = max(0, equals - here)
        cuts.append(cut)
    return cuts
