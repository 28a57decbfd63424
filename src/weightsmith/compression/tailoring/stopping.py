"""When a trial is given up while it is scored: once it can't come back into the running.

Examples are scored in rounds. After each, the score that the trial would have if all remaining examples were
right is compared with trials of the same budget that are done: where enough of these are better, however the
tasks are weighed, the rest is not scored.

    below the highest rung   as many of the rung's trials, those before it, as may go on to the next rung
    at the highest rung      as many as have children: then this one can't, and isn't in the Pareto set

Better is: as good on every task and better on one, for sure. So a trial that is given up could neither have
gone on nor been chosen. What it would have cost is not known; its cost is that of what was scored.

Which trials are before it is a matter of the rung's order and not of the clock: a worker that scored more
than it had to, because it did not know of them yet, has that taken away.

Source  arXiv:2506.20480 scores every trial to its end. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Spans = Mapping[str, tuple[int, int]]
"""Of each task: the first example to score, in the task's order, and one past the last."""
Values = Mapping[str, Sequence[float]]
"""Of each task: scores of the examples of its span, as far as there are any."""

_ROUNDS, _LEAST = 4, 16
"""Rounds of a trial at most; examples of one task in a round at least: small batches are slow."""
_SURE = 1e-9
"""Costs are sums of a thousand numbers of six places: what differs by more than this differs."""


def rounds(spans: Spans) -> list[Spans]:
    """The spans in pieces, one after the other; they depend on nothing else."""
    longest = max((stop - start for start, stop in spans.values()), default=0)
    count = max(1, min(_ROUNDS, longest // _LEAST))

    def until(start: int, stop: int, piece: int) -> int:
        return start + math.ceil((stop - start) * piece / count)

    return [
        {task: (until(*span, piece), until(*span, piece + 1)) for task, span in spans.items()}
        for piece in range(count)
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

    def trimmed(self, spans: Spans, values: Values) -> dict[str, tuple[float, ...]] | None:
        """The scores up to where it is first hopeless; None where it never is before the end."""
        for piece in rounds(spans)[:-1]:
            kept = {
                task: tuple(values.get(task, ())[: stop - spans[task][0]])
                for task, (_, stop) in piece.items()
            }
            if any(len(kept[task]) < stop - spans[task][0] for task, (_, stop) in piece.items()):
                return None  # it was given up before
            if self.is_hopeless(kept):
                return {task: found for task, found in kept.items() if found}
        return None
