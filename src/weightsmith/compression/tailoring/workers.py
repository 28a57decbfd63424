"""Where trials are computed: here, in processes of this machine, or on a Ray cluster.

Processes get the pool once and share its memory. Answers come in any order; whoever asks puts them in theirs.
"""

from __future__ import annotations

import concurrent.futures as futures
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from weightsmith.compression.tailoring.evaluator import Evaluator, Outcome
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut, Spans
from weightsmith.errors import InputError, SystemFault, require

Job = tuple[Configuration, Spans, Cut | None]

_evaluator: Evaluator | None = None
"""Of a worker process."""


class Workers(Protocol):
    """Computes trials."""

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each job by its number, in any order.

        A job is asked for when its turn comes, so that it can know of those before it.
        """
        ...


class Here:
    """One trial after the other, in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        for number in numbers:
            yield number, self._evaluator(*job(number))


class Processes:
    """Trials in processes of this machine."""

    def __init__(self, executor: futures.Executor, count: int) -> None:
        self._executor, self._count = executor, count

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        waiting = deque(numbers)
        running: dict[futures.Future[Outcome], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._count:
                    number = waiting.popleft()
                    running[self._executor.submit(_evaluate, *job(number))] = number
                done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for one in done:
                    yield running.pop(one), one.result()
        except futures.BrokenExecutor as problem:
            raise SystemFault(
                f"a worker of the search died ({problem}); what it had finished is in the log"
            ) from problem
        finally:
            for left in running:
                left.cancel()


class Machines:
    """Trials on the actors of a Ray cluster, each with the pool once."""

    def __init__(self, ray: Any, actors: list[Any]) -> None:
        self._ray, self._actors = ray, actors

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        waiting, running = deque(numbers), {}
        free = list(self._actors)
        while waiting or running:
            while waiting and free:
                number, actor = waiting.popleft(), free.pop()
                running[actor.evaluate.remote(*job(number))] = (number, actor)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            number, actor = running.pop(done)
            free.append(actor)
            try:
                yield number, self._ray.get(done)
            except self._ray.exceptions.RayTaskError as problem:
                raise problem.cause or problem from problem
            except self._ray.exceptions.RayError as problem:
                raise SystemFault(f"ray: a worker of the search was lost: {problem}") from problem


def workers(evaluator: Evaluator, count: int = 1, ray: str | None = None) -> AbstractContextManager[Workers]:
    """Where to compute; resources are given back at the end of the block.

    Args:
        evaluator: What computes a trial.
        count: Trials at once.
        ray: "auto" for the cluster that this machine is in, "local", or HOST:PORT.

    Raises:
        InputError: fewer than one worker, or no such cluster.
        MissingExtraError: ray is asked for and not installed.
        SystemFault: shared memory is too small for the pool.
    """
    if count < 1:
        raise InputError(f"workers: {count}, expected at least 1")
    if ray is not None:
        return _machines(evaluator, count, ray)
    return _processes(evaluator, count) if count > 1 else nullcontext(Here(evaluator))


@contextmanager
def _processes(evaluator: Evaluator, count: int) -> Iterator[Workers]:
    import torch.multiprocessing as multiprocessing

    _check_tasks(evaluator)
    _check_shared_memory(evaluator)
    # Torch must not be forked: its threads and its CUDA contexts don't survive it.
    with futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(evaluator,)
    ) as executor:
        yield Processes(executor, count)


@contextmanager
def _machines(evaluator: Evaluator, count: int, address: str) -> Iterator[Workers]:
    ray = require("ray", extra="ray", needed_by="a search on several machines")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR"
            )
        except (ConnectionError, ValueError, RuntimeError) as problem:
            first = str(problem).strip().partition("\n")[0]
            raise InputError(
                f"ray: no cluster at `{address}` ({first}); expected auto, local or HOST:PORT of one that "
                "runs"
            ) from problem
    try:
        common = ray.put(evaluator)
        remote = ray.remote(num_cpus=1)(_Actor)
        actors = [remote.remote(common) for _ in range(count)]
        yield Machines(ray, actors)
        for actor in actors:
            ray.kill(actor)
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """A worker of a cluster."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def evaluate(self, configuration: Configuration, spans: Spans, cut: Cut | None) -> Outcome:
        return self._evaluator(configuration, spans, cut)


def _begin(evaluator: Evaluator) -> None:
    global _evaluator
    _evaluator = evaluator


def _evaluate(configuration: Configuration, spans: Spans, cut: Cut | None) -> Outcome:
    assert _evaluator is not None
    return _evaluator(configuration, spans, cut)


def _check_tasks(evaluator: Evaluator) -> None:
    """Processes need the tasks, which a function defined inside of another can't reach."""
    for task in evaluator.tasks:
        try:
            pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as problem:
            raise InputError(
                f"task `{task.name}` can't go to other processes ({problem}); define its function in a "
                "module, or take one worker"
            ) from problem


def _check_shared_memory(evaluator: Evaluator) -> None:
    """Processes share weights through the system's shared memory, which a container may have little of."""
    if evaluator.pool.device.type != "cpu" or not os.path.isdir("/dev/shm"):
        return
    disk = os.statvfs("/dev/shm")
    free, needed = disk.f_bavail * disk.f_frsize, evaluator.pool.nbytes
    if free < needed:
        raise SystemFault(
            f"/dev/shm: {free / 1e9:.2f} GB are free, the pool of layers takes {needed / 1e9:.2f} GB; make "
            "it larger or take one worker"
        )
