"""One trial: a configuration put together and scored on examples of each task, piece by piece."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.prefix import PrefixCache
from weightsmith.compression.tailoring.scoring import NonFiniteError, Task, checked, scored
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut, Spans
from weightsmith.compression.tailoring.trials import PLACES, Status
from weightsmith.errors import InputError
from weightsmith.evaluation.models import default_threads, intra_op_threads


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        status: As in `Trial`.
        values: Scores by task, in the task's order.
        seconds: It took.
        kind: Type of the error of a failed one.
        error: Its traceback.
    """

    status: Status
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    kind: str = ""
    error: str | None = None


class Evaluator:
    """Scores configurations of a pool. Can be pickled: processes then share the pool's memory.

    Args:
        pool: The layers.
        tasks: Prepared tasks.
        orders: Of each task, the order of its examples.
        prefix_bytes: For the cache of activations; every process has its own.

    Attributes:
        at_once: Trials at a time on this machine: they share its cores.
    """

    def __init__(
        self, pool: LayerPool, tasks: Sequence[Task], orders: Mapping[str, Sequence[int]], prefix_bytes: int
    ) -> None:
        self.pool, self.tasks, self._orders = pool, tuple(tasks), orders
        self._prefix_bytes = prefix_bytes
        self.prefix = PrefixCache(prefix_bytes)
        self.at_once = 1
        self._threads = default_threads(sum(value.numel() for value in pool.base.parameters()))

    @property
    def num_threads(self) -> int:
        """Of a trial."""
        return max(1, self._threads // self.at_once)

    def __call__(self, configuration: Configuration, spans: Spans) -> Outcome:
        """Score the examples of `spans`.

        Raises:
            InputError: a score is no number in 0..1, which no configuration can help.
        """
        begun = time.perf_counter()
        values: dict[str, tuple[float, ...]] = {}
        try:
            with intra_op_threads(self.num_threads):
                model = self.pool.assemble(configuration)
                wanted = [(task, self._orders[task.name][slice(*spans[task.name])]) for task in self.tasks]
                wanted = [(task, indices) for task, indices in wanted if indices]
                with self.prefix.reading(model, self.pool, configuration):
                    found = scored(model, wanted)
            for (task, indices), scores in zip(wanted, found, strict=True):
                sound = checked(task, scores, len(indices))
                values[task.name] = tuple(round(score, PLACES) for score in sound)
        except NonFiniteError as problem:
            return Outcome("nonfinite", seconds=time.perf_counter() - begun, error=str(problem))
        except InputError:
            raise
        except Exception as problem:
            return Outcome(
                "failed",
                seconds=time.perf_counter() - begun,
                kind=type(problem).__name__,
                error=traceback.format_exc(),
            )
        return Outcome("ok", values, time.perf_counter() - begun)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prefix": PrefixCache(self._prefix_bytes)}


class Tally:
    """What a trial has come to. Its pieces may be given to several workers; they count in order.

    Args:
        configuration: What is measured.
        parts: The pieces.
        cut: What it is up against, where it may be given up.

    Attributes:
        configuration: As given.
        outcome: Of the trial, once it has ended.
    """

    def __init__(self, configuration: Configuration, parts: Sequence[Spans], cut: Cut | None) -> None:
        self.configuration = configuration
        self.outcome: Outcome | None = None
        self._parts, self._cut = parts, cut
        self._num_given = self._num_counted = 0
        self._came: dict[int, Outcome] = {}
        self._values: dict[str, tuple[float, ...]] = {}
        self._seconds = 0.0

    @property
    def num_left(self) -> int:
        """Pieces to give to workers."""
        return len(self._parts) - self._num_given if self.outcome is None else 0

    def give(self) -> tuple[int, Spans]:
        """The next piece and its number."""
        self._num_given += 1
        return self._num_given - 1, self._parts[self._num_given - 1]

    def add(self, number: int, came: Outcome) -> None:
        """What came of a piece; of no consequence where the trial ended without it."""
        self._came[number] = came
        while self.outcome is None and self._num_counted in self._came:
            self._count(self._came.pop(self._num_counted))

    def _count(self, came: Outcome) -> None:
        self._num_counted += 1
        self._seconds += came.seconds
        if came.status != "ok":
            self.outcome = replace(came, seconds=self._seconds)
            return
        for task, new in came.values.items():
            self._values[task] = (*self._values.get(task, ()), *new)
        if self._num_counted == len(self._parts):
            self.outcome = Outcome("ok", self._values, self._seconds)
        elif self._cut is not None and self._cut.is_hopeless(self._values):
            self.outcome = Outcome("stopped", self._values, self._seconds)
