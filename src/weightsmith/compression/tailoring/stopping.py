"""The pieces a trial is scored in, and when it is given up between them: once it can't come back into the
running.

Pieces end at the budgets and a few places between them, the same for all trials: what one began, another
finds in the cache of activations; workers can share a trial; and none of that changes a score by a bit. After
each piece, the score that the trial would have if all remaining examples were right is compared with trials
of the same budget that are done: where enough of these are better, however the tasks are weighed, the rest is
not scored.

    below the highest rung   as many of the rung's trials, those before it, as may go on to the next rung
    at the highest rung      as many as have children: then this one can't, and isn't in the Pareto set

Better is: as good on every task and better on one, for sure. So a trial that is given up could neither have
gone on nor been chosen. What it would have cost is not known; its cost is that of what was scored.

Which trials are before it is a matter of the rung's order and not of the clock: a worker that scored more
than it had to, because it did not know of them yet, has that taken away.

Source  arXiv:2506.20480 scores every trial to its end. Ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Spans = Mapping[str, tuple[int, int]]
"""Of each task: the first example to score, in the task's order, and one past the last."""
Values = Mapping[str, Sequence[float]]
"""Of each task: scores of the examples of its span, as far as there are any."""

_PIECES, _LEAST = 4, 16
"""Pieces between two budgets at most; examples of one task in a piece at least: small batches are slow."""
_SURE = 1e-9
"""Costs are sums of a thousand numbers of six places: what differs by more than this differs."""


def edges(rungs: Sequence[int]) -> tuple[int, ...]:
    """Where pieces end, as numbers of examples.

    Example:
        >>> edges([30, 90])
        (30, 50, 70, 90)
    """
    found = []
    for low, high in itertools.pairwise((0, *rungs)):
        count = max(1, min(_PIECES, (high - low) // _LEAST))
        found += [low + math.ceil((high - low) * piece / count) for piece in range(1, count + 1)]
    return tuple(found)


def pieces(spans: Spans, ends: Sequence[int]) -> list[Spans]:
    """The spans in pieces, one after the other, cut at `ends` and nowhere else; at least one.

    Example:
        >>> pieces({"a": (10, 70), "b": (10, 20)}, [30, 50, 70, 90])
        [{'a': (10, 30), 'b': (10, 20)}, {'a': (30, 50), 'b': (20, 20)}, {'a': (50, 70), 'b': (20, 20)}]
    """
    first = min(start for start, _ in spans.values())
    last = max(stop for _, stop in spans.values())
    cuts = [first, *(end for end in ends if first < end < last), last]
    return [
        {
            task: (min(max(low, start), stop), min(max(high, start), stop))
            for task, (start, stop) in spans.items()
        }
        for low, high in itertools.pairwise(cuts)
    ]


@dataclass(frozen=True)
class Cut:
    """What a trial is up against.

    Attributes:
        survivors: Trials that must be better for it to be hopeless.
        rivals: Costs of those that are done, by task.
        known: Of each task the sum of the scores that it has from lower rungs, and how many these are.
        totals: Of each task the examples at this budget.
    """

    survivors: int
    rivals: Sequence[Mapping[str, float]]
    known: Mapping[str, tuple[float, int]]
    totals: Mapping[str, int]

    def is_hopeless(self, values: Values) -> bool:
        """Whether enough rivals are better than it can still become.

        Example:
            >>> cut = Cut(1, [{"a": 0.25}], {"a": (0.0, 0)}, {"a": 4})
            >>> cut.is_hopeless({"a": [1.0, 0.0]}), cut.is_hopeless({"a": [0.0, 0.0]})
            (False, True)
        """
        best = {}
        for task, total in self.totals.items():
            (right, count), new = self.known[task], values.get(task, ())
            best[task] = (count + len(new) - right - sum(new)) / total
        better = sum(
            all(rival[task] <= cost + _SURE / 1000 for task, cost in best.items())
            and any(rival[task] < cost - _SURE for task, cost in best.items())
            for rival in self.rivals
        )
        return better >= self.survivors

    def trimmed(self, parts: Sequence[Spans], values: Values) -> dict[str, tuple[float, ...]] | None:
        """The scores up to the piece after which it is hopeless; None where it never is before the end."""
        for part in parts[:-1]:
            kept = {
                task: tuple(values.get(task, ())[: stop - parts[0][task][0]])
                for task, (_, stop) in part.items()
            }
            if any(len(kept[task]) < stop - parts[0][task][0] for task, (_, stop) in part.items()):
                return None  # it was given up before
            if self.is_hopeless(kept):
                return {task: found for task, found in kept.items() if found}
        return None
