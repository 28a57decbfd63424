"""Which layers are dropped, and what stands in the places of the others: the space that is searched.

Problem  l layers, K fine-tunes of one base. R = ceil(l s) layers go; each one kept is the base's, one
         fine-tune's, or a task-arithmetic blend of several: W0 + lambda sum_j (Wj - W0).
Method   A configuration is the set that is dropped (not R numbers, of which R! orders mean the same), the
         sources of each kept layer, and lambda where there are two or more. Layers never change their order,
         and a place is only filled from the same place of another model.
Source   arXiv:2506.20480, section 3; its public code. Ours: the encoding as a set, lambda in steps of 0.001,
         and no `output_scale` per layer, which that code draws, stores and never applies.
Letters  l layers of the base, K fine-tunes, R dropped layers
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import InputError

DIGITS = 3
"""Of lambda, in a search; plans may hold more."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A kept layer.

    Attributes:
        layer: Its number in the base.
        sources: Numbers of fine-tunes, from 1, ascending; none is the base.
        weight: Lambda; 1 where fewer than two sources leave nothing to weigh.
    """

    layer: int
    sources: tuple[int, ...] = ()
    weight: float = 1.0

    @property
    def is_merged(self) -> bool:
        """Whether it is computed rather than taken as it is."""
        return len(self.sources) > 1


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to tailor a model, in the one form that is kept of all that mean the same. Make it with `of`.

    Attributes:
        depth: l, layers of the base.
        layers: The kept ones, in order.
    """

    depth: int
    layers: tuple[Layer, ...]

    @classmethod
    def of(
        cls,
        depth: int,
        dropped: Sequence[int] = (),
        sources: Mapping[int, Sequence[int]] | None = None,
        weights: Mapping[int, float] | None = None,
        *,
        digits: int | None = DIGITS,
    ) -> Configuration:
        """The configuration in its canonical form.

        Args:
            depth: l.
            dropped: Layers that go, in any order.
            sources: Fine-tunes (from 1) by layer of the base; the base where a layer has no entry.
            weights: Lambda by layer; 1 where a layer has no entry. A lambda of 0 is the base.
            digits: Places lambda is rounded to; None keeps it.

        Raises:
            InputError: a number of a layer is not there, or nothing would be kept.

        Example:
            >>> Configuration.of(3, [1], {0: [2, 1], 2: [1]}, {0: 0.5, 2: 0.7}).layers
            (Layer(layer=0, sources=(1, 2), weight=0.5), Layer(layer=2, sources=(1,), weight=1.0))
        """
        gone = set(dropped)
        for number in sorted(gone | set(sources or ())):
            if number not in range(depth):
                raise InputError(f"no layer {number}: the base has layers 0..{depth - 1}")
        if len(gone) >= depth:
            raise InputError(f"all {depth} layers would be dropped; at least one must be kept")
        kept = []
        for number in range(depth):
            if number in gone:
                continue
            chosen = tuple(sorted(set((sources or {}).get(number, ()))))
            weight = (weights or {}).get(number, 1.0)
            if digits is not None:
                weight = round(weight, digits)
            if len(chosen) < 2:
                weight = 1.0
            elif weight == 0:
                chosen, weight = (), 1.0
            kept.append(Layer(number, chosen, float(weight)))
        return cls(depth, tuple(kept))

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers, in the base, of the layers that are kept."""
        return tuple(layer.layer for layer in self.layers)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers, in the base, of the layers that go."""
        kept = set(self.kept)
        return tuple(number for number in range(self.depth) if number not in kept)

    @property
    def num_merged(self) -> int:
        """Layers that are blends."""
        return sum(layer.is_merged for layer in self.layers)

    @property
    def key(self) -> str:
        """Equal texts for equal configurations."""
        return ";".join(
            f"{layer.layer}:{'+'.join(map(str, layer.sources))}" + f"*{layer.weight!r}" * layer.is_merged
            for layer in self.layers
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "depth": self.depth,
            "layers": [
                {"layer": layer.layer, "sources": list(layer.sources)}
                | ({"weight": layer.weight} if layer.is_merged else {})
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str = "configuration") -> Configuration:
        """Read back what `to_json` gave.

        Raises:
            InputError: it is no configuration; names `source`.
        """
        try:
            depth, layers = int(value["depth"]), list(value["layers"])
            kept = [int(layer["layer"]) for layer in layers]
            if kept != sorted(set(kept)):
                raise InputError(f"{source}: layers {kept} are not in ascending order, each once")
            return cls.of(
                depth,
                [number for number in range(depth) if number not in kept],
                {int(layer["layer"]): [int(number) for number in layer["sources"]] for layer in layers},
                {int(layer["layer"]): float(layer.get("weight", 1.0)) for layer in layers},
                digits=None,
            )
        except (KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, InputError):
                raise
            raise InputError(f"{source}: not a configuration of layers: {problem!r}") from problem


def num_dropped(depth: int, sparsity: float | None = None, keep_layers: int | None = None) -> int:
    """R: the layers to drop.

    Args:
        depth: l.
        sparsity: Share of layers to drop: R = ceil(l s).
        keep_layers: Layers to keep, instead.

    Raises:
        InputError: both or neither are given, or nothing would be kept.

    Example:
        >>> num_dropped(32, sparsity=0.27), num_dropped(32, keep_layers=23)
        (9, 9)
    """
    if (sparsity is None) == (keep_layers is None):
        found = "both" if sparsity is not None else "neither"
        raise InputError(f"give one of sparsity and keep_layers (1..{depth}), found {found}")
    if keep_layers is not None:
        if keep_layers not in range(1, depth + 1):
            raise InputError(f"keep_layers: {keep_layers}, expected 1..{depth}")
        return depth - keep_layers
    assert sparsity is not None
    # 0.1 * 30 is 3.0000000000000004: a hair above a whole number is that number.
    number = math.ceil(depth * sparsity - 1e-9) if math.isfinite(sparsity) else -1
    if not 0 <= sparsity < 1 or number not in range(depth):
        raise InputError(f"sparsity: {sparsity} drops {number} of {depth} layers, expected 0..{depth - 1}")
    return number


def grid(low: float, high: float) -> tuple[int, int]:
    """The least and the largest lambda of a range, in units of its last digit."""
    step = 10**DIGITS
    return math.ceil(low * step - 1e-6), math.floor(high * step + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All configurations of one search.

    Attributes:
        depth: l.
        num_dropped: R.
        num_candidates: K.
        low: Least lambda.
        high: Largest lambda.
        merge: Whether a layer may have two sources and more.
    """

    depth: int
    num_dropped: int
    num_candidates: int = 0
    low: float = 0.0
    high: float = 1.0
    merge: bool = True

    def __post_init__(self) -> None:
        if self.num_dropped not in range(self.depth):
            raise InputError(
                f"{self.num_dropped} of {self.depth} layers to drop, expected 0..{self.depth - 1}"
            )
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise InputError(f"lambda_range: ({self.low}, {self.high}), expected (least, largest)")

    @property
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """The sources that a layer can have."""
        largest = self.num_candidates if self.merge else min(1, self.num_candidates)
        numbers = range(1, self.num_candidates + 1)
        return tuple(
            itertools.chain.from_iterable(itertools.combinations(numbers, k) for k in range(largest + 1))
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Every lambda that differs from the base."""
        first, last = grid(self.low, self.high)
        return tuple(number / 10**DIGITS for number in range(first, last + 1) if number)

    @property
    def size(self) -> int:
        """Number of different configurations."""
        single = 1 + self.num_candidates
        merged = (2**self.num_candidates - single) * len(self.weights) if self.merge else 0
        return math.comb(self.depth, self.num_dropped) * (single + merged) ** (self.depth - self.num_dropped)

    def weight(self, value: float) -> float:
        """`value` as a lambda of this space."""
        first, last = (number / 10**DIGITS for number in grid(self.low, self.high))
        return min(max(round(value, DIGITS), first), last)

    def configuration(
        self,
        dropped: Sequence[int],
        sources: Mapping[int, Sequence[int]] | None = None,
        weights: Mapping[int, float] | None = None,
    ) -> Configuration:
        """The canonical configuration, lambda clipped to the range."""
        clipped = {layer: self.weight(value) for layer, value in (weights or {}).items()}
        return Configuration.of(self.depth, dropped, sources, clipped)

    def random(self, rng: random.Random) -> Configuration:
        """A configuration drawn uniformly: the set, the sources of each kept layer, lambda."""
        dropped = rng.sample(range(self.depth), self.num_dropped)
        subsets = self.subsets
        sources, weights = {}, {}
        for layer in range(self.depth):
            if layer not in dropped:
                sources[layer] = rng.choice(subsets)
                weights[layer] = rng.uniform(self.low, self.high)
        return self.configuration(dropped, sources, weights)

    def every(self) -> Iterator[Configuration]:
        """Every configuration, once, in a fixed order: only for small spaces."""
        options: list[tuple[tuple[int, ...], float]] = []
        for subset in self.subsets:
            options += [(subset, weight) for weight in (self.weights if len(subset) > 1 else (1.0,))]
        for dropped in itertools.combinations(range(self.depth), self.num_dropped):
            kept = [layer for layer in range(self.depth) if layer not in dropped]
            for chosen in itertools.product(options, repeat=len(kept)):
                yield self.configuration(
                    dropped,
                    {layer: subset for layer, (subset, _) in zip(kept, chosen, strict=True)},
                    {layer: weight for layer, (_, weight) in zip(kept, chosen, strict=True)},
                )

    def check(self, configuration: Configuration) -> None:
        """Refuse a configuration of another space.

        Raises:
            InputError: other depth, other number of dropped layers, or a source that is not there.
        """
        if (configuration.depth, len(configuration.dropped)) != (self.depth, self.num_dropped):
            raise InputError(
                f"a configuration drops {len(configuration.dropped)} of {configuration.depth} layers, "
                f"expected {self.num_dropped} of {self.depth}"
            )
        for layer in configuration.layers:
            if layer.sources not in self.subsets:
                raise InputError(
                    f"layer {layer.layer}: sources {list(layer.sources)}, expected "
                    f"{'some' if self.merge else 'one'} of 1..{self.num_candidates}"
                )
