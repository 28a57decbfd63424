"""The k largest magnitudes of a stream, exactly and without a sort.

Problem  Trimming keeps the int(density * n) largest changes of a tensor, or of a whole model that does not
         fit into memory. Checkpoints in bfloat16 are full of equal and zero changes, so a mask
         `magnitude >= threshold` keeps too many: among equals, the lower index must win.
Method   The bits of a non-negative float order like the float, so magnitudes are compared as integers. A
         sample gives a bracket [low, high] that should hold the k-th largest. One pass counts what lies
         above and collects the few that lie inside; a partition of those ends it. When the bracket missed,
         or holds too much to keep, it is narrowed (by a coarse count of what it holds: 65,536 times at
         once) and the pass is made again: never more than five, whatever the data.
Result   A `Cut`: the k-th magnitude and, for equals, the tile and the count up to which they are kept.
Cost     About 0.6 ns per element and pass. Memory: at most `COLLECTED_ELEMENTS` values for each selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAGNITUDE_BITS = 0x7FFFFFFF
COLLECTED_ELEMENTS = 1 << 21
_COARSE_BITS = 16
# Half width of the sampled bracket in standard deviations of a quantile of independent draws. The sample
# comes in runs of neighbours, which are alike, so this is wider than independence would ask for.
_MARGIN = 6.0


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


def magnitude_bits(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The bits of |values|: fp32 (n,) into int32 (n,)."""
    return np.bitwise_and(values.view(np.int32), np.int32(MAGNITUDE_BITS), out=out)


def keep_mask(bits: np.ndarray, cut: Cut, start: int, out: np.ndarray) -> np.ndarray:
    """All-ones words where an element of the tile at `start` is kept, zero elsewhere.

    Args:
        bits: Magnitudes of the tile as int32 (n,), from `magnitude_bits`. Left untouched.
        cut: The cut of this tile's part.
        start: Where the tile starts in its part; tiles must be those of the scan.
        out: int32 (n,).
    """
    equals_kept = start < cut.start
    # (limit - bits) is negative exactly where bits > limit; the shift spreads its sign over the word.
    np.subtract(np.int32(cut.bits - equals_kept), bits, out=out)
    np.right_shift(out, 31, out=out)
    if start == cut.start and cut.count:
        out[np.flatnonzero(bits == np.int32(cut.bits))[: cut.count]] = -1
    return out


class Scan:
    """One pass over one part of a stream, against the bracket of its selection. Belongs to one thread."""

    def __init__(self, low: int, high: int, limit: int) -> None:
        self.low, self.high = low, high
        self.above = 0
        self.inside = 0
        self.tiles: list[tuple[int, int]] = []
        self.collected: list[np.ndarray] | None = [] if low < high else None
        self.coarse: np.ndarray | None = None
        self._limit = limit

    @property
    def shift(self) -> int:
        """How many low bits a coarse bin spans."""
        return max(0, (self.high - self.low).bit_length() - _COARSE_BITS)

    def add(self, start: int, bits: np.ndarray, work: np.ndarray, flags: np.ndarray) -> None:
        """Take in the tile at `start`.

        Args:
            start: Index of its first element; tiles come in ascending order.
            bits: Magnitudes, int32 (n,). Left untouched.
            work: Scratch, int32 (n,).
            flags: Scratch, bool (at least n rounded up to 8,).
        """
        flag = flags[: bits.size]
        np.greater(bits, np.int32(self.high), out=flag)
        self.above += int(np.count_nonzero(flag))
        if self.low == self.high:
            np.equal(bits, np.int32(self.low), out=flag)
        else:
            # One unsigned comparison for both ends: what lies below `low` wraps round to large.
            np.subtract(bits, np.int32(self.low), out=work)
            np.less_equal(work.view(np.uint32), np.uint32(self.high - self.low), out=flag)
        inside = int(np.count_nonzero(flag))
        self.tiles.append((start, inside))
        if inside and self.low < self.high:
            self._take(_compress(work, flags, inside), inside)
        self.inside += inside

    def _take(self, offsets: np.ndarray, inside: int) -> None:
        if self.collected is not None:
            self.collected.append(offsets)
            if self.inside + inside <= self._limit:
                return
            offsets, self.collected = np.concatenate(self.collected), None
            self.coarse = np.zeros(1 << _COARSE_BITS, np.int64)
        assert self.coarse is not None
        self.coarse += np.bincount(offsets >> self.shift, minlength=self.coarse.size)


class Selection:
    """Finds the `count` largest magnitudes among `numel`, over as many passes as it takes (one or two).

    Use: until `cuts` is set, make one `scan` for each part, feed it every tile, give the scans to `finish` in
    the order of the parts. Parts in that order are one long stream to the lower-index rule.

    Args:
        count: How many to keep, 0 .. numel.
        numel: Elements of the stream.
        sample: Magnitude bits of some of its elements, int32; all of them, or a few thousand spread evenly.
    """

    def __init__(self, count: int, numel: int, sample: np.ndarray) -> None:
        self.count, self.numel = count, numel
        self.cuts: list[Cut] | None = None
        self._floor, self._ceiling = 0, MAGNITUDE_BITS
        self._low, self._high = self._bracket(sample) if 0 < count < numel else (0, 0)

    def scan(self, numel: int) -> Scan:
        """An empty scan of a part of `numel` elements against the present bracket."""
        return Scan(self._low, self._high, max(COLLECTED_ELEMENTS * numel // max(self.numel, 1), 1024))

    def finish(self, scans: Sequence[Scan]) -> list[Cut] | None:
        """Take one whole pass; returns (and keeps) the cut of each part once they are known."""
        if self.count == 0:
            self.cuts = [KEEP_NONE] * len(scans)
        elif self.count == self.numel:
            self.cuts = [Cut(0, float("inf"))] * len(scans)
        else:
            self._narrow(scans)
        return self.cuts

    def _bracket(self, sample: np.ndarray) -> tuple[int, int]:
        size = sample.size
        if size == 0:
            return 0, MAGNITUDE_BITS
        fraction = self.count / self.numel
        rank = self.count if size == self.numel else fraction * size
        margin = 0.0 if size == self.numel else _MARGIN * (fraction * (1 - fraction) * size) ** 0.5 + 4
        first, last = size - int(rank + margin), size - int(rank - margin)
        wanted = sorted({max(first, 0), min(last, size - 1)})
        ordered = np.partition(sample, wanted)
        low = 0 if first < 0 else int(ordered[wanted[0]])
        high = MAGNITUDE_BITS if last >= size and margin else int(ordered[wanted[-1]])
        return low, high

    def _narrow(self, scans: Sequence[Scan]) -> None:
        above = sum(scan.above for scan in scans)
        inside = sum(scan.inside for scan in scans)
        rank = self.count - above  # among those inside, 1 is the largest
        if rank <= 0:
            self._floor = self._high + 1
            self._low, self._high = self._floor, self._ceiling
        elif rank > inside:
            self._ceiling = self._low - 1
            self._low, self._high = self._floor, self._ceiling
        elif self._low == self._high:
            self.cuts = _cuts(scans, self._low, rank, [dict(scan.tiles) for scan in scans])
        elif any(scan.coarse is not None for scan in scans):
            self._low, self._high = _coarse_bin(scans, rank)
        else:
            offsets = np.concatenate([part for scan in scans for part in scan.collected or ()])
            offsets.partition(inside - rank)
            threshold = int(offsets[inside - rank])
            rank -= int(np.count_nonzero(offsets > threshold))
            self.cuts = _cuts(
                scans, self._low + threshold, rank, [_equals_by_tile(scan, threshold) for scan in scans]
            )


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
            scan.add(start, bits, np.empty_like(bits), np.empty(tile.size + 7, np.bool_))
            start += tile.size
        selection.finish([scan])
    return selection.cuts[0]


def _compress(values: np.ndarray, flags: np.ndarray, count: int) -> np.ndarray:
    """`values[flags]`, in order; where few are set, eight flags are looked at in one step."""
    size = values.size
    if count * 16 > size:
        return np.compress(flags[:size], values)
    padded = -(-size // 8) * 8
    flags[size:padded] = False
    groups = np.flatnonzero(flags[:padded].view(np.uint64))
    where = (groups[:, None] * 8 + np.arange(8))[flags[:padded].reshape(-1, 8)[groups]]
    return values[where]


def _coarse_bin(scans: Sequence[Scan], rank: int) -> tuple[int, int]:
    first = scans[0]
    counts = np.zeros(1 << _COARSE_BITS, np.int64)
    for scan in scans:
        if scan.coarse is not None:
            counts += scan.coarse
        for offsets in scan.collected or ():
            counts += np.bincount(offsets >> scan.shift, minlength=counts.size)
    from_top = np.cumsum(counts[::-1])
    bin = counts.size - 1 - int(np.searchsorted(from_top, rank))
    low = first.low + (bin << first.shift)
    return low, min(low + (1 << first.shift) - 1, first.high)


def _equals_by_tile(scan: Scan, threshold: int) -> dict[int, int]:
    filled = [start for start, inside in scan.tiles if inside]
    return {
        start: int(np.count_nonzero(offsets == threshold))
        for start, offsets in zip(filled, scan.collected or (), strict=True)
    }


def _cuts(scans: Sequence[Scan], bits: int, equals: int, found: Sequence[dict[int, int]]) -> list[Cut]:
    """The cut of every part when `equals` elements equal to the threshold are to be kept."""
    cuts = []
    for scan, by_tile in zip(scans, found, strict=True):
        last = Cut(bits, float("inf"))
        for start, _ in scan.tiles:
            here = by_tile.get(start, 0)
            if here >= equals and last.start == float("inf"):
                last = Cut(bits, float(start), equals)
            equals = max(0, equals - here)
        cuts.append(last)
    return cuts
