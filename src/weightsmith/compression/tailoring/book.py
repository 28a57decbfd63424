"""Trials of a running search: their numbers, their scores so far, and what the log knows of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

from weightsmith.compression.tailoring.backends import Request
from weightsmith.compression.tailoring.evaluator import Outcome
from weightsmith.compression.tailoring.scoring import Task
from weightsmith.compression.tailoring.stopping import Cut, Spans, edges, pieces
from weightsmith.compression.tailoring.trials import Trial, TrialLog, lengthened
from weightsmith.compression.tailoring.workers import Job
from weightsmith.errors import WeightsmithError

Key = tuple[str, int]


class TailorError(WeightsmithError):
    """A search gave no plan: its trials failed. The message holds their tracebacks."""


class Book:
    """What was asked, and what came of it.

    Outcomes may come in any order. They count, and are logged, in the order in which one worker would have
    computed them: whether a trial is given up depends on those before it.

    Args:
        tasks: Prepared tasks.
        trial_log: Where trials are durable.
        rungs: Budgets, ascending.
        max_failures: Trials that may fail by one kind of error.
        early_stop: Whether hopeless trials are given up.

    Attributes:
        trials: By configuration and budget.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        trial_log: TrialLog,
        rungs: Sequence[int],
        *,
        max_failures: int,
        early_stop: bool,
    ) -> None:
        self._tasks, self._log, self._max_failures = tasks, trial_log, max_failures
        self._lowest, self._highest, self._early_stop = rungs[0], rungs[-1], early_stop
        self._edges = edges(rungs)
        self.trials: dict[Key, Trial] = {}
        self._numbers: dict[Key, int] = {}
        self._requests: dict[int, Request] = {}
        self._values: dict[tuple[str, str], tuple[float, ...]] = {}
        self._failures: Counter[str] = Counter()
        self._places: dict[Key, int] = {}  # of what was asked last; what was known before comes first
        self._queue: deque[int] = deque()
        self._parts: dict[int, list[Spans]] = {}
        self._came: dict[int, Outcome] = {}
        self._logged: dict[int, Trial] = {}

    def begin(self, asked: Sequence[Request], most: int) -> list[int]:
        """Number what is new, up to `most` trials in all; what the log knows is taken from there.

        Returns:
            Numbers of what is to be computed, in order. At the lowest rung those that begin alike are side by
            side: their first layers are run once. At higher ones the best of the rung below come first: they
            are what the others have to be as good as.
        """
        by_merit = any(one.survivors is not None and one.budget > self._lowest for one in asked)
        ordered = list(asked) if by_merit else sorted(asked, key=lambda one: one.configuration.key)
        self._places = {
            _key(request): -1 if _key(request) in self._numbers else place
            for place, request in enumerate(ordered)
        }
        for request in asked:
            key = _key(request)
            if key not in self._numbers and len(self._numbers) < most:
                number = self._numbers[key] = len(self._numbers)
                self._requests[number] = request
                found = self._log.found.get(key)
                if found is not None and found.status != "failed":  # a failure's cause may be gone
                    self._logged[number] = found
        fresh = dict.fromkeys(_key(request) for request in ordered if self._places[_key(request)] >= 0)
        self._queue.extend(self._numbers[key] for key in fresh if key in self._numbers)
        new = [number for number in self._queue if number not in self._logged]
        self._settle()
        return new

    def job(self, number: int) -> Job:
        """What to compute: of each task the examples that no lower budget has scored, in pieces."""
        request = self._requests[number]
        spans = {}
        for task in self._tasks:
            known = len(self._values.get((request.configuration.key, task.name), ()))
            stop = min(request.budget, task.size)
            spans[task.name] = (min(known, stop), stop)
        self._parts[number] = pieces(spans, self._edges)
        return request.configuration, self._parts[number], self._cut(number)

    def take(self, number: int, outcome: Outcome) -> None:
        """An outcome came."""
        self._came[number] = outcome
        self._settle()

    def finish(self, number: int, outcome: Outcome) -> None:
        """Make an outcome durable: every one before it is."""
        request, cut = self._requests[number], self._cut(number)
        if cut is not None and outcome.status in ("ok", "stopped"):
            kept = cut.trimmed(self._parts[number], outcome.values)
            if kept is not None:
                outcome = replace(outcome, status="stopped", values=kept)
        costs, starts = {}, {task: start for task, (start, _) in self._parts[number][0].items()}
        for task in self._tasks:
            key = (request.configuration.key, task.name)
            new = outcome.values.get(task.name, ())
            values = lengthened(self._values.get(key, ()), starts[task.name], new)
            used = values[: min(request.budget, task.size)]
            sound = outcome.status in ("ok", "stopped")
            costs[task.name] = 1.0 - sum(used) / len(used) if sound else 1.0
        trial = Trial(
            id=number,
            configuration=request.configuration,
            budget=request.budget,
            costs=costs,
            status=outcome.status,
            seconds=outcome.seconds,
            error=outcome.error,
            values=outcome.values,
            starts=starts,
        )
        self._log.add(trial)
        self._remember(trial)
        if outcome.status == "failed":
            self._failures[outcome.kind] += 1
            if self._failures[outcome.kind] >= self._max_failures:
                raise TailorError(
                    f"{self._max_failures} trials failed by {outcome.kind}, which looks like a fault and not "
                    f"like bad models:\n{outcome.error}"
                )

    def answers(self, asked: Sequence[Request]) -> list[Trial] | None:
        """Trials in the order of what was asked; None where one has no answer."""
        found = [self.trials.get(_key(request)) for request in asked]
        return None if None in found else [trial for trial in found if trial is not None]

    def _settle(self) -> None:
        """Let count what came, as far as everything before it has come."""
        while self._queue:
            number = self._queue[0]
            if number in self._logged:
                self._accept(number, self._logged.pop(number))
            elif number in self._came:
                self.finish(number, self._came.pop(number))
            else:
                return
            self._queue.popleft()

    def _accept(self, number: int, found: Trial) -> None:
        """A trial of the log. A search that ended within a rung knew of fewer trials than there are now."""
        _, parts, cut = self.job(number)
        starts = {task: start for task, (start, _) in parts[0].items()}
        new = {task: scores[starts[task] : parts[-1][task][1]] for task, scores in found.values.items()}
        new = {task: scores for task, scores in new.items() if scores}
        shorter = cut.trimmed(parts, new) if cut is not None and found.status != "nonfinite" else None
        if shorter is not None and shorter != new:
            self.finish(number, Outcome("stopped", shorter, found.seconds))
        else:
            self._remember(replace(found, id=number, values=new, starts=starts))

    def _cut(self, number: int) -> Cut | None:
        """What a trial is up against: those before it that are done."""
        request = self._requests[number]
        if request.survivors is None or not self._early_stop:
            return None
        if request.budget == self._highest:
            beside = [key for key in self.trials if key[1] == self._highest]
        else:
            beside = [key for key in self._places if key in self.trials]
        place = self._places[_key(request)]
        before = [self.trials[key] for key in beside if self._places.get(key, -1) < place]
        known, totals = {}, {}
        for task in self._tasks:
            totals[task.name] = min(request.budget, task.size)
            values = self._values.get((request.configuration.key, task.name), ())[: totals[task.name]]
            known[task.name] = (sum(values), len(values))
        return Cut(
            survivors=request.survivors,
            rivals=[trial.costs for trial in before if trial.status == "ok"],
            known=known,
            totals=totals,
        )

    def _remember(self, trial: Trial) -> None:
        self.trials[trial.key] = trial
        for task, values in trial.values.items():
            key = (trial.configuration.key, task)
            self._values[key] = lengthened(self._values.get(key, ()), trial.starts[task], values)


def _key(request: Request) -> Key:
    return request.configuration.key, request.budget
