"""What a search begins with: three seeded orders of dropping, each with a grid of sources and weights.

    higher-first     layers l/2 .. l-2 in random order, then the lower ones
    middle-outward   the seven layers around the middle in random order, then the others
    alternating      one of the upper half, one of the lower half, in turns

The last and the first layer come at the end of every order, so they are dropped only when nothing else is
left.
For each order: the base alone, and 6 values of lambda for each pattern of sources, the same in every layer.

Source  arXiv:2506.20480, public code: 3 (1 + 6 * 7) = 129 starts for K = 3, whose patterns (all subsets) are
        written out there. Ours: for any K the subsets of one and two and all together, which for K = 3 are
        the same seven; repeats left out; one more start for each model, alone and without the layers of its
        least block influence.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from weightsmith.compression.tailoring.space import Configuration, Space

WEIGHTS = (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)
DROP_SEED = 42
_AROUND = 3


def drop_orders(depth: int, seed: int = DROP_SEED) -> dict[str, tuple[int, ...]]:
    """The three orders in which layers are dropped, all layers each.

    Args:
        depth: l.
        seed: Of the shuffling.

    Example:
        >>> {name: order[-2:] for name, order in drop_orders(8).items()}
        {'higher-first': (7, 0), 'middle-outward': (7, 0), 'alternating': (7, 0)}
    """
    rng = random.Random(seed)
    ends = [depth - 1, 0] if depth > 1 else [0]
    inner, middle = range(1, depth - 1), depth // 2
    upper = [layer for layer in inner if layer >= middle]
    lower = [layer for layer in inner if layer < middle]
    around = [layer for layer in inner if abs(layer - middle) <= _AROUND]
    others = [layer for layer in inner if abs(layer - middle) > _AROUND]

    def shuffled(layers: Sequence[int]) -> list[int]:
        return rng.sample(layers, len(layers))

    turns = itertools.zip_longest(shuffled(upper), shuffled(lower))
    orders = {
        "higher-first": shuffled(upper) + shuffled(lower),
        "middle-outward": shuffled(around) + shuffled(others),
        "alternating": [layer for pair in turns for layer in pair if layer is not None],
    }
    return {name: (*order, *ends) for name, order in orders.items()}


def patterns(num_candidates: int) -> list[tuple[int, ...]]:
    """The sets of sources that starts try: each fine-tune, each pair, all together."""
    numbers = range(1, num_candidates + 1)
    found = [(number,) for number in numbers] + list(itertools.combinations(numbers, 2))
    return list(dict.fromkeys([*found, tuple(numbers)])) if num_candidates else []


def starting_grid(space: Space, seed: int = DROP_SEED) -> list[Configuration]:
    """Every start with its repeats: 3 (1 + 6 patterns)."""
    found = []
    for order in drop_orders(space.depth, seed).values():
        dropped = order[: space.num_dropped]
        found.append(space.configuration(dropped))
        for weight, pattern in itertools.product(WEIGHTS, patterns(space.num_candidates)):
            found.append(
                space.configuration(
                    dropped,
                    dict.fromkeys(range(space.depth), pattern),
                    dict.fromkeys(range(space.depth), weight),
                )
            )
    return found


def starts(
    space: Space,
    influences: Sequence[Sequence[float]] = (),
    *,
    limit: int | None = None,
    seed: int = DROP_SEED,
) -> list[Configuration]:
    """The configurations that a search begins with, each once.

    Args:
        space: The space; starts with sources that it doesn't allow are left out.
        influences: Block influence of each layer, of the base and of each fine-tune: one start for each is
            that model without its R smallest.
        limit: At most so many. Those by influence and the bases alone come first, the others in a seeded
            order.
        seed: Of the orders.
    """
    grid = [
        c for c in starting_grid(space, seed) if all(layer.sources in space.subsets for layer in c.layers)
    ]
    first = []
    for number, influence in enumerate(influences):
        order = sorted(range(space.depth), key=lambda layer: (influence[layer], layer))
        sources = dict.fromkeys(range(space.depth), (number,) if number else ())
        first.append(space.configuration(order[: space.num_dropped], sources))
    first += [
        configuration for configuration in grid if not any(layer.sources for layer in configuration.layers)
    ]
    first = list(dict.fromkeys(first))
    others = [configuration for configuration in dict.fromkeys(grid) if configuration not in first]
    if limit is None or len(first) + len(others) <= limit:
        return first + others
    return first[:limit] + random.Random(seed).sample(others, max(0, limit - len(first)))
