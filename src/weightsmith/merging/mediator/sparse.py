"""The few entries in which an expert differs from the dense part: chosen exactly, stored small.

    layout    bytes for n entries in r rows, k of them kept, v bytes a value
    dense     v n                        every entry
    bitmap    n / 8 + v k                one bit an entry, then the kept values in order
    csr       i k + 4 (r + 1) + v k      column numbers of i = 2 bytes (4 where rows are wider), row starts
    int8      v = 1, and 4 r for the rows' scales

The smallest is taken: at two bytes a value csr below a density of 1/16, bitmap up to 0.94. Exactly
floor(density n) entries are kept; among equal magnitudes the lower index. Rows are the last axis; vectors are
kept whole.

Source  Mediator, arXiv:2502.04411: one dense and several sparse experts. Density and layouts are decided
        here.
Cost    Packing 2 ns an entry for the choice, unpacking about 1 ns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from weightsmith.checkpoints import TensorSpec
from weightsmith.errors import CheckpointError
from weightsmith.merging.mediator.options import MediatorConfig
from weightsmith.runs.seeds import derive
from weightsmith.tensors.floats import from_float32, storage_dtype, to_float32
from weightsmith.tensors.selection import keep_mask, largest, magnitude_bits

Layout = Literal["dense", "bitmap", "csr"]
LAYOUTS: tuple[Layout, ...] = ("dense", "bitmap", "csr")
_TILE = 1 << 20


@dataclass(frozen=True)
class Form:
    """How one tensor's difference is stored.

    Attributes:
        shape: Of the tensor.
        dtype: Safetensors dtype of the kept values: that of the model, or "I8" with scales.
        layout: See the module's text.
        count: Entries kept.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    count: int

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else 1

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each stored part, by name."""
        parts: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.layout == "bitmap":
            parts["bitmap"] = ("U8", (-(-self.numel // 8),))
        elif self.layout == "csr":
            parts["columns"] = (_column_dtype(self.shape), (self.count,))
            parts["starts"] = ("U32", (self.rows + 1,))
        shape = self.shape if self.layout == "dense" else (self.count,)
        parts["values"] = (self.dtype, shape)
        if self.dtype == "I8":
            parts["scale"] = ("F32", (self.rows,))
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(TensorSpec("", dtype, shape).nbytes for dtype, shape in self.specs().values())


def kept(numel: int, density: float) -> int:
    """floor(density n), by the decimal that was written: 0.1 of 30 is 3."""
    return min(numel, math.floor(density * numel + 1e-9))


def choose_form(shape: tuple[int, ...], dtype: str, count: int, config: MediatorConfig) -> Form:
    """The form of a difference with `count` entries kept: the smallest, or the one asked for.

    Args:
        shape: Of the tensor; one of fewer than two dimensions is stored whole, in the model's type.
        dtype: The model's.
        count: Entries to keep.
        config: Its `layout` and `values`.
    """
    if len(shape) < 2:
        return Form(shape, dtype, "dense", math.prod(shape))
    stored = "I8" if config.values == "int8" else dtype
    wanted = LAYOUTS if config.layout == "auto" else (config.layout,)
    forms = [Form(shape, stored, layout, count) for layout in wanted]
    return min(forms, key=lambda form: form.nbytes)


def select(residual: np.ndarray, count: int) -> np.ndarray:
    """Which `count` entries have the largest magnitude: fp32 (n,) -> bool (n,); ties keep the lower index."""
    if count in (0, residual.size):
        return np.full(residual.size, count > 0)
    tiles = [residual[at : at + _TILE] for at in range(0, residual.size, _TILE)]
    cut = largest(tiles, count)
    mask = np.empty(residual.size, np.bool_)
    for number, tile in enumerate(tiles):
        start = number * _TILE
        bits = magnitude_bits(tile, np.empty(tile.size, np.int32)).reshape(1, -1)
        mask[start : start + tile.size] = keep_mask(bits, (cut,), start, bits)[0] != 0
    return mask


def count_for_error(residual: np.ndarray, least: int, max_rel_err: float) -> int:
    """The fewest largest entries, at least `least`, without which no more than `max_rel_err` of the norm is
    lost.
    """
    squares = np.sort(np.square(residual, dtype=np.float64))
    lost = np.sqrt(np.cumsum(squares))  # lost[i]: norm of the i + 1 smallest
    dropped = int(np.searchsorted(lost, max_rel_err * lost[-1], side="right")) if squares.size else 0
    return max(least, residual.size - dropped)


def thinned(
    residual: np.ndarray, count: int, config: MediatorConfig, name: str, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """The entries an expert keeps, and their values.

    Args:
        residual: Difference from the dense part, fp32 (n,).
        count: Entries to keep.
        config: Its `select`, `rescale` and `seed`.
        name: The tensor, and
        task: the expert: random choices depend on both.

    Returns:
        bool (n,) and fp32 (count,).
    """
    if config.select == "random" and count < residual.size:
        rng = np.random.default_rng(derive(config.seed, name, task))
        mask = np.zeros(residual.size, np.bool_)
        mask[rng.permutation(residual.size)[:count]] = True
        return mask, residual[mask] * np.float32(residual.size / max(count, 1))
    mask = select(residual, count)
    values = residual[mask]
    if config.rescale == "l1":
        left = float(np.abs(values).sum(dtype=np.float64))
        if left > 0:
            values = values * np.float32(np.abs(residual).sum(dtype=np.float64) / left)
    return mask, values


def pack(form: Form, mask: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The stored parts of a difference.

    Args:
        form: How to store it.
        mask: bool (n,), `form.count` of them true; all for a dense form may be fewer.
        values: fp32, one for each true entry.

    Returns:
        Arrays by part; float values as the bits of their dtype.
    """
    parts: dict[str, np.ndarray] = {}
    if form.layout == "dense":
        whole = np.zeros(form.numel, np.float32)
        whole[mask] = values
        mask, values = np.ones(form.numel, np.bool_), whole
    elif form.layout == "bitmap":
        parts["bitmap"] = np.packbits(mask, bitorder="little")
    else:
        places = np.flatnonzero(mask)
        width = form.shape[-1]
        parts["columns"] = (places % width).astype(storage_dtype(_column_dtype(form.shape)))
        starts = np.zeros(form.rows + 1, np.uint32)
        starts[1:] = np.cumsum(mask.reshape(form.rows, -1).sum(axis=1))
        parts["starts"] = starts
    if form.dtype == "I8":
        rows = _rows_of(form, mask)
        largest_of_row = np.zeros(form.rows, np.float32)
        np.maximum.at(largest_of_row, rows, np.abs(values))
        parts["scale"] = largest_of_row / np.float32(127)
        scale = np.where(parts["scale"] > 0, parts["scale"], 1)[rows]
        parts["values"] = np.rint(values / scale).astype(np.int8)
    else:
        parts["values"] = from_float32(np.ascontiguousarray(values, np.float32), form.dtype)
    return parts


def unpack(form: Form, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of the kept entries: int64 (count,) in ascending order and fp32 (count,)."""
    if form.layout == "dense":
        places = np.arange(form.numel)
    elif form.layout == "bitmap":
        bits = np.unpackbits(parts["bitmap"], count=form.numel, bitorder="little")
        places = np.flatnonzero(bits)
    else:
        starts = parts["starts"].astype(np.int64)
        rows = np.repeat(np.arange(form.rows), np.diff(starts))
        places = rows * form.shape[-1] + parts["columns"]
    if form.dtype == "I8":
        values = parts["values"].reshape(-1).astype(np.float32)
        values *= parts["scale"][places // (form.shape[-1] if len(form.shape) > 1 else form.numel)]
    else:
        values = to_float32(parts["values"], form.dtype)
    return places, values


def add_to(target: np.ndarray, weight: float, form: Form, parts: Mapping[str, np.ndarray]) -> None:
    """`target += weight * difference` in place, fp32 (n,)."""
    if form.layout == "dense" and form.dtype != "I8":
        target += np.float32(weight) * to_float32(parts["values"], form.dtype)
        return
    places, values = unpack(form, parts)
    target[places] += np.float32(weight) * values


def check_parts(form: Form, parts: Mapping[str, np.ndarray], what: str) -> None:
    """Refuse parts that contradict each other: a wrong number of bits, columns outside of the rows.

    Raises:
        CheckpointError: `what` is damaged.
    """
    if form.layout == "bitmap":
        found = int(np.bitwise_count(parts["bitmap"]).sum(dtype=np.int64))
        if found != form.count:
            raise CheckpointError(f"{what}: its bitmap marks {found} entries, expected {form.count}")
    elif form.layout == "csr":
        starts = parts["starts"].astype(np.int64)
        ordered = starts[0] == 0 and starts[-1] == form.count and bool((np.diff(starts) >= 0).all())
        if not ordered or (form.count and int(parts["columns"].max()) >= form.shape[-1]):
            raise CheckpointError(f"{what}: its rows and columns don't fit a tensor of {list(form.shape)}")


def _rows_of(form: Form, mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask) // (form.shape[-1] if len(form.shape) > 1 else form.numel)


def _column_dtype(shape: tuple[int, ...]) -> str:
    return "U16" if shape[-1] < 65_536 else "U32"


__all__ = [
    "Form",
    "add_to",
    "check_parts",
    "choose_form",
    "count_for_error",
    "kept",
    "pack",
    "select",
    "thinned",
    "unpack",
]
