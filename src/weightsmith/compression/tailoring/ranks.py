"""A search in several ranks of a process group, such as those that torchrun starts: each trial's examples are
shared among them.

The first rank searches and has the log. The others hold the pool, too, and score what they are told to. What
is put together again are the scores of single examples, so shares may be of any size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from weightsmith.compression.tailoring.evaluator import Evaluator, Outcome
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Spans
from weightsmith.errors import InputError, WeightsmithError


def place() -> tuple[int, int]:
    """Number of this rank, and how many there are; 0 and 1 without a process group."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


class Leader:
    """Scores as the evaluator does, with the help of all ranks; for the first one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        _share_cores(evaluator)

    def __call__(self, configuration: Configuration, spans: Spans) -> Outcome:
        """As `Evaluator`.

        Raises:
            InputError: as there, on any rank.
        """
        _tell((configuration, spans))
        found = _gathered(self._evaluator, configuration, spans)
        for one in found:
            if isinstance(one, InputError):
                raise one
        seconds = max(one.seconds for one in found)
        bad = next((one for one in found if one.status != "ok"), None)
        if bad is not None:
            return replace(bad, seconds=seconds)
        values = {
            task: tuple(chain.from_iterable(one.values.get(task, ()) for one in found))
            for task, (start, stop) in spans.items()
            if start < stop
        }
        return Outcome("ok", values, seconds)


@contextmanager
def leading() -> Iterator[None]:
    """Where the block fails, the ranks that `follow` are told why."""
    try:
        yield
    except BaseException as problem:
        _tell(str(problem) or type(problem).__name__)
        raise


def finish(result: Any) -> None:
    """Send the others home with what `follow` returns there."""
    _tell(("done", result))


def follow(evaluator: Evaluator) -> Any:
    """Score what the first rank asks for, until it is done.

    Returns:
        What it gave to `finish`.

    Raises:
        WeightsmithError: it failed.
    """
    _share_cores(evaluator)
    while True:
        told = _told()
        if isinstance(told, str):
            raise WeightsmithError(f"the search ended on the first rank: {told}")
        if told[0] == "done":
            return told[1]
        _gathered(evaluator, *told)


def _gathered(evaluator: Evaluator, configuration: Configuration, spans: Spans) -> list[Any]:
    """What came of each rank's share; of use on the first only."""
    import torch.distributed as dist

    rank, world = place()
    shares = {
        task: (start + (stop - start) * rank // world, start + (stop - start) * (rank + 1) // world)
        for task, (start, stop) in spans.items()
    }
    try:
        mine: Outcome | InputError = evaluator(configuration, shares)
    except InputError as problem:  # which the first rank raises: the others must not wait for this one
        mine = problem
    found: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, found)
    return found or []


def _share_cores(evaluator: Evaluator) -> None:
    evaluator.at_once = int(os.environ.get("LOCAL_WORLD_SIZE", place()[1]))


def _tell(message: Any) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([message])


def _told() -> Any:
    import torch.distributed as dist

    heard = [None]
    dist.broadcast_object_list(heard)
    return heard[0]
