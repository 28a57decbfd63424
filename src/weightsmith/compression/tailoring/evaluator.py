"""One trial: a configuration put together and scored on the next examples of each task."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.prefix import PrefixCache
from weightsmith.compression.tailoring.scoring import NonFiniteError, Task, checked
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut, Spans, rounds
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
    """

    def __init__(
        self, pool: LayerPool, tasks: Sequence[Task], orders: Mapping[str, Sequence[int]], prefix_bytes: int
    ) -> None:
        self.pool, self.tasks, self._orders = pool, tuple(tasks), orders
        self._prefix_bytes = prefix_bytes
        self.prefix = PrefixCache(prefix_bytes)
        self._threads = default_threads(sum(value.numel() for value in pool.base.parameters()))

    def __call__(self, configuration: Configuration, spans: Spans, cut: Cut | None = None) -> Outcome:
        """Score the examples of `spans`, in rounds where there is a `cut`, until it is hopeless by that.

        Raises:
            InputError: a score is no number in 0..1, which no configuration can help.
        """
        begun = time.perf_counter()
        values: dict[str, tuple[float, ...]] = {}
        status: Status = "ok"
        pieces = [spans] if cut is None else rounds(spans)
        try:
            model = self.pool.assemble(configuration)
            with (
                intra_op_threads(self._threads),
                self.prefix.reading(model, self.pool.path, configuration),
            ):
                for piece in pieces:
                    for task in self.tasks:
                        indices = self._orders[task.name][slice(*piece[task.name])]
                        if indices:
                            scores = checked(task, task.score(model, indices), len(indices))
                            new = tuple(round(score, PLACES) for score in scores)
                            values[task.name] = (*values.get(task.name, ()), *new)
                    if cut is not None and piece is not pieces[-1] and cut.is_hopeless(values):
                        status = "stopped"
                        break
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
        return Outcome(status, values, time.perf_counter() - begun)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prefix": PrefixCache(self._prefix_bytes)}
