"""What a merge method sees: one parameter of all models, as tiles or whole, and the protocol it follows.

A method is one frozen keyword-only dataclass in `merging/methods/<id>.py`. Its fields are its options (the
schema of a page, the keywords of `merge_tensors`); a field of type `PerModel` holds one number for all models
or one for each. The engine resolves filters and gradients, so that the instance which meets a parameter holds
plain values: every `PerModel` field is then a tuple with one number a model. A field named `lambda_` is
`lambda` on a page.

    survey(parameter)            optional pass over one parameter; its result goes to `merge_tile` as `stats`
    survey_all(parameters, ...)  the same over all parameters at once, where `global_survey` is true
    merge_tile(tile, stats)      the merged fp32 elements of one tile
    survey_bytes(parameters, threads)   optional: memory surveys take beyond tiles, for predictions
    plain_sum()                  optional: weights and divisor, where the merged elements are that sum of the
                                 models and nothing else; models stored as bfloat16 are then never widened
    takes(parameter)             spectral methods: true for the matrices that take the whole-matrix route
    merge_whole(...)             spectral methods: the merged matrix and a dict for the report
    per_task, task               class attribute, option: the output is for the task of one model, 1 .. T; a
                                 merge without `task` makes a folder for each
    check_models(T)              optional: raise `OptionError` where options don't fit the number of models
    statistics                   class attribute "fisher" or "gram": which statistics parameters must carry

A method sees the tiles of one parameter in ascending order from one thread; two parameters may be in work at
once. What it returns may depend on element positions but never on where tiles begin: sums over a parameter go
through `weightsmith.merging.sums`, random numbers through a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from weightsmith.errors import CheckpointError
from weightsmith.tensors import bfloat16_sums
from weightsmith.tensors.floats import to_float32

PerModel = float | tuple[float, ...]
NanPolicy = Literal["raise", "zero"]
Reader = Callable[[int, int, np.ndarray], Any]
"""Fills an fp32 buffer with elements [start, stop) of a flattened tensor."""

# Big enough that Python's share of the work is a tenth, small enough that the buffers of two workers stay in
# a shared cache.
TILE_ELEMENTS = 131_072
# Tiles of vectors, and the pieces of long rows, begin at multiples of this.
GRAIN_ELEMENTS = 4096
# A sample takes every eighth element of runs of so many: a read costs as much as thousands of elements, and
# neighbours are alike.
SAMPLED_RUN = 32_768
_SAMPLED_STEP = 8


class Scratch:
    """Buffers of one worker, kept from tile to tile so that a merge allocates nothing in its loop."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}

    def get(self, key: str, numel: int, dtype: Any = np.float32) -> np.ndarray:
        """A 1-D buffer with unspecified content; the same `key` and `dtype` give the same memory again."""
        kind = np.dtype(dtype)
        buffer = self._buffers.get((key, kind))
        if buffer is None or buffer.size < numel:
            buffer = self._buffers[key, kind] = np.empty(numel, kind)
        return buffer[:numel]

    def filled(self, value: float, numel: int) -> np.ndarray:
        """Read-only fp32 copies of one number, where an array is a faster operand than a scalar."""
        key = f"filled {value}", np.dtype(np.float32)
        if key not in self._buffers or self._buffers[key].size < numel:
            self._buffers[key] = np.full(numel, value, np.float32)
        return self._buffers[key][:numel]


@dataclass(frozen=True, slots=True)
class Statistic:
    """What `weightsmith stats` measured of one parameter in one model.

    Attributes:
        shape: The parameter's own for Fisher information, (inputs, inputs) for the Gram matrix of a layer.
        read: Fills an fp32 buffer with elements [start, stop), flattened.
    """

    shape: tuple[int, ...]
    read: Reader

    def whole(self) -> np.ndarray:
        """All of it, fp32 of `shape`."""
        values = np.empty(int(np.prod(self.shape, dtype=np.int64)), np.float32)
        self.read(0, values.size, values)
        return values.reshape(self.shape)


@dataclass(slots=True)
class Tile:
    """Consecutive elements of one flattened parameter in all models.

    Attributes:
        start: Index of the first element in the flattened parameter.
        base: fp32 (n,), or None for methods without a base. May be overwritten.
        models: fp32 (T, n). May be overwritten.
        scratch: Buffers of the worker.
    """

    start: int
    base: np.ndarray | None
    models: np.ndarray
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    @property
    def numel(self) -> int:
        """Elements in this tile."""
        return self.models.shape[1]

    def deltas(self) -> np.ndarray:
        """The models turned into their differences from the base, in place."""
        assert self.base is not None
        return np.subtract(self.models, self.base, out=self.models)


class Parameter:
    """One output parameter and where its values come from.

    Attributes:
        name: Name in the output.
        shape: Shape, the same in all models.
        models: Labels of the T models, without the base.
        layer: Index of the output layer, None outside the layer stack.
        config: config.json of the model the output takes after: heads and sizes, for fused layers.
        statistics: Of each model, for methods that ask for them; empty where nothing was measured.
        scratch: Buffers of the worker that has this parameter in hand; set by the engine.

    Args:
        readers: One for each model.
        base_reader: None for methods without a base.
        base_label: What messages call the base.
        bits_readers: Where base and models are all stored as bfloat16: a reader of the stored bits for each,
            base first, that fills bytes. Tiles are then widened in one go.
        nan_policy: What to do about NaN and infinity.
        tile_elements: Elements of a tile, about.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        *,
        models: Sequence[str],
        readers: Sequence[Reader],
        base_reader: Reader | None = None,
        base_label: str = "base",
        bits_readers: Sequence[Reader] = (),
        statistics: Sequence[Statistic] = (),
        layer: int | None = None,
        config: Mapping[str, Any] | None = None,
        nan_policy: NanPolicy = "raise",
        tile_elements: int = TILE_ELEMENTS,
    ) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.models = tuple(models)
        self.layer = layer
        self.config = config or {}
        self.statistics = tuple(statistics)
        self.scratch = Scratch()
        self.numel = int(np.prod(self.shape, dtype=np.int64))
        self._readers = tuple(readers)
        self._base_reader = base_reader
        self._base_label = base_label
        self._bits_readers = tuple(bits_readers)
        self._nan_policy = nan_policy
        self._tile_elements = tile_elements
        self._known_finite = False
        self._met_nonfinite = False

    @property
    def num_models(self) -> int:
        """T, the number of models without the base."""
        return len(self.models)

    @property
    def has_base(self) -> bool:
        """Whether tiles carry a base."""
        return self._base_reader is not None

    @property
    def row(self) -> int:
        """Elements of one row: the last axis of a matrix or stack, the whole of a vector."""
        return max(1, self.shape[-1] if len(self.shape) >= 2 else self.numel)

    def spans(self, tiles: int = 1) -> Iterator[tuple[int, int]]:
        """The [start, stop) of each tile, or of as many together: whole rows, or multiples of
        `GRAIN_ELEMENTS` of a vector.
        """
        grain = self.row if len(self.shape) >= 2 else GRAIN_ELEMENTS
        step = max(1, tiles * self._tile_elements // grain) * grain
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def tiles(self) -> Iterator[Tile]:
        """All elements in ascending order; may be called any number of times.

        A tile's buffers are used again for the next one: copy what must outlive the loop's step.

        Raises:
            CheckpointError: NaN or infinity in a tensor under `nan_policy` "raise"; names tensor and model.
        """
        for start, stop in self.spans():
            yield self.tile(start, stop)
        # Every element was looked at: later passes need not look again.
        self._known_finite = not self._met_nonfinite

    def tile(self, start: int, stop: int) -> Tile:
        """The elements [start, stop) of base and models."""
        return self._as_tile(start, self._read(start, stop))

    def sum_of_bits(
        self, start: int, stop: int, weights: Sequence[float], divisor: float
    ) -> np.ndarray | None:
        """The weighted sum of models that are stored as bfloat16, rounded to that: uint16 (n,).

        Returns:
            None where models are stored otherwise, or the sum is not finite: their tile tells more.
        """
        if not self._bits_readers or self.has_base:
            return None
        numel = stop - start
        even = numel + numel % 2
        row = self.scratch.get("bits of a source", even, np.uint16)
        out = self.scratch.get("bits of a sum", even, np.uint16)
        row[numel:] = 0

        def rows() -> Iterator[np.ndarray]:
            for reader in self._bits_readers:
                reader(start, stop, row[:numel].view(np.uint8))
                yield row

        with np.errstate(over="ignore", invalid="ignore"):
            finite = bfloat16_sums.weighted_sum_bfloat16(rows(), weights, divisor, out, self.scratch.get)
        return out[:numel] if finite else None

    def sample(self, numel: int) -> Tile:
        """About `numel` elements, evenly spread, in fresh memory; all of them if there are no more."""
        numel = min(numel, self.numel)
        seen = numel * _SAMPLED_STEP
        run = self.numel if seen >= self.numel else min(SAMPLED_RUN, seen)
        count = max(1, min(seen, self.numel) // max(run, 1))
        places = np.linspace(0, run - 1, numel // count).astype(np.int64)
        firsts = np.linspace(0, self.numel - run, count).astype(np.int64).tolist()
        return self._as_tile(-1, np.hstack([self._read(at, at + run)[:, places] for at in firsts]))

    def whole(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Everything at once, in fresh memory: base fp32 of `shape` (or None), models fp32 (T, *shape)."""
        base = None
        if self._base_reader is not None:
            base = np.empty(self.numel, np.float32)
            self._fill(base, self._base_reader, self._base_label, 0, self.numel)
            base = base.reshape(self.shape)
        models = np.empty((self.num_models, self.numel), np.float32)
        for index, reader in enumerate(self._readers):
            self._fill(models[index], reader, self.models[index], 0, self.numel)
        return base, models.reshape(self.num_models, *self.shape)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """The elements of base (if any) and models in a scratch buffer: fp32 (sources, n)."""
        numel = stop - start
        values = self.scratch.get("sources", self._num_sources * numel).reshape(self._num_sources, numel)
        if not self._bits_readers:
            for row, (reader, label) in zip(values, self._sources(), strict=True):
                self._fill(row, reader, label, start, stop)
            return values
        bits = self.scratch.get("bits of sources", values.size, np.uint16).reshape(values.shape)
        for row, reader in zip(bits.view(np.uint8), self._bits_readers, strict=True):
            reader(start, stop, row)
        to_float32(bits, "BF16", values)
        if not (self._known_finite or bfloat16_sums.all_finite(bits)):
            for row, (_, label) in zip(values, self._sources(), strict=True):
                self._check_finite(row, label, start)
        return values

    def _as_tile(self, start: int, values: np.ndarray) -> Tile:
        if self.has_base:
            return Tile(start, values[0], values[1:], self.scratch)
        return Tile(start, None, values, self.scratch)

    @property
    def _num_sources(self) -> int:
        return self.num_models + self.has_base

    def _sources(self) -> list[tuple[Reader, str]]:
        """Reader and label of the base (if any) and the models."""
        models = list(zip(self._readers, self.models, strict=True))
        return models if self._base_reader is None else [(self._base_reader, self._base_label), *models]

    def _fill(self, values: np.ndarray, reader: Reader, label: str, start: int, stop: int) -> None:
        reader(start, stop, values)
        if not self._known_finite:
            self._check_finite(values, label, start)

    def _check_finite(self, values: np.ndarray, label: str, start: int) -> None:
        if values.size == 0 or _all_finite(values):
            return
        if self._nan_policy == "zero":
            self._met_nonfinite = True
            values[~np.isfinite(values)] = 0.0
            return
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise CheckpointError(
            f"{label}: {self.name} holds {values[at]} at element {start + at} of {self.numel}; every weight "
            f"must be finite (`nan_policy: zero` takes such entries as 0). No output was written."
        )


def _all_finite(values: np.ndarray) -> bool:
    # Largest and smallest carry NaN along and cost a quarter of isfinite().all().
    return bool(values.max() < np.inf and values.min() > -np.inf)


class MergeMethod(Protocol):
    """What the engine needs of a method's dataclass; see the module's text for the optional parts."""

    base: ClassVar[Literal["required", "optional", "none"]]
    min_models: ClassVar[int]
    max_models: ClassVar[int | None]

    def survey(self, parameter: Parameter) -> Any:
        """A first pass over one parameter; None where the method needs none."""

    def merge_tile(self, tile: Tile, stats: Any) -> np.ndarray:
        """The merged elements of `tile`, fp32 (n,); may be one of its buffers."""


ParallelMap = Callable[[Callable[[Parameter], Any], Sequence[Parameter]], list[Any]]
"""Applies a function to every parameter on the engine's workers; results keep the order of the parameters."""


class GlobalSurvey(Protocol):
    """The rest of a method whose statistic spans parameters (TIES trimmed globally, RESM per layer)."""

    @property
    def global_survey(self) -> bool:
        """Whether these options need `survey_all`; `survey` is then not called."""

    def survey_all(self, parameters: Sequence[Parameter], parallel: ParallelMap) -> Mapping[str, Any]:
        """Stats of each parameter by name."""
