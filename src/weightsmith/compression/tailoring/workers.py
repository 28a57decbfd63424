"""Where trials are computed: here, in more processes of this machine, on a Ray cluster, or in the ranks of a
process group.

Processes share the pool's memory. Where each has but one thread, on Linux and a CPU, they are forked: up at
once, with all that this process has, tasks that can't be pickled too. Torch's threads and its CUDA contexts
don't survive a fork, so other processes start from nothing. That takes seconds, in which this one has long
begun; each is given its first piece of a trial when it is up.

A worker goes on with the trial it has, else it begins another one, else it takes a piece of one that another
has begun: at high budgets there are fewer trials than workers. Answers come in any order; whoever asks puts
them in theirs.
"""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

from weightsmith.compression.tailoring import ranks
from weightsmith.compression.tailoring.evaluator import Evaluator, Outcome, Tally
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut, Spans
from weightsmith.errors import InputError, SystemFault, require
from weightsmith.runs.processes import end_with_parent

Job = tuple[Configuration, Sequence[Spans], Cut | None]
"""A configuration, the pieces to score, and what it is up against."""

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

    def __init__(self, score: Callable[[Configuration, Spans], Outcome]) -> None:
        self._score = score

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        for number in numbers:
            tally = Tally(*job(number))
            while tally.outcome is None:
                place, spans = tally.give()
                tally.add(place, self._score(tally.configuration, spans))
            yield number, tally.outcome


Submit = Callable[[Configuration, Spans], "futures.Future[Outcome]"]


class _Worker:
    """Scores one piece at a time; `tally` is the trial that the last one was of."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.tally: Tally | None = None


class _Crew:
    """Several workers at once.

    Args:
        submits: Of each worker that is up, what gives it a piece.
        starting: Of each that is not, what ends when it is.
    """

    def __init__(
        self, submits: Sequence[Submit], starting: Mapping[futures.Future[None], Submit] | None = None
    ) -> None:
        self._free = [_Worker(submit) for submit in submits]
        self._starting = dict(starting or {})

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        waiting = deque(numbers)
        begun: dict[Tally, int] = {}
        running: dict[futures.Future[Outcome], tuple[_Worker, Tally, int]] = {}

        def chosen(worker: _Worker) -> Tally | None:
            if worker.tally is not None and worker.tally.num_left:
                return worker.tally
            if waiting:
                number = waiting.popleft()
                begun[tally := Tally(*job(number))] = number
                return tally
            return max(
                (tally for tally in begun if tally.num_left), key=lambda one: one.num_left, default=None
            )

        while waiting or begun or running:
            while self._free and (tally := chosen(self._free[-1])) is not None:
                worker = self._free.pop()
                worker.tally = tally
                place, spans = tally.give()
                running[worker.submit(tally.configuration, spans)] = (worker, tally, place)
            watched: list[futures.Future[Any]] = [*running, *self._starting]
            done, _ = futures.wait(watched, return_when=futures.FIRST_COMPLETED)
            for up in self._starting.keys() & done:
                up.result()
                self._free.append(_Worker(self._starting.pop(up)))
            for one in running.keys() & done:
                worker, tally, place = running.pop(one)
                self._free.append(worker)
                tally.add(place, one.result())
                if tally.outcome is not None and tally in begun:
                    yield begun.pop(tally), tally.outcome


class Processes(_Crew):
    """This process and others of this machine."""

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        try:
            yield from super().outcomes(numbers, job)
        except futures.BrokenExecutor as problem:
            raise SystemFault(
                f"a worker of the search died ({problem}); what it had finished is in the log"
            ) from problem


class Machines(_Crew):
    """The actors of a Ray cluster, each with the pool once."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        super().__init__([partial(_submit_to, actor) for actor in actors])
        self._ray = ray

    def outcomes(self, numbers: Sequence[int], job: Callable[[int], Job]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers`."""
        try:
            yield from super().outcomes(numbers, job)
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
        InputError: fewer than one worker, no such cluster, or either in one of several ranks.
        MissingExtraError: ray is asked for and not installed.
        SystemFault: shared memory is too small for the pool.
    """
    if count < 1:
        raise InputError(f"workers: {count}, expected at least 1")
    if (world := ranks.place()[1]) > 1:
        if count > 1 or ray is not None:
            raise InputError(
                f"workers: this is one of {world} ranks, which share each trial; expected one worker and no "
                "ray"
            )
        return nullcontext(Here(ranks.Leader(evaluator)))
    if ray is not None:
        return _machines(evaluator, count, ray)
    return _processes(evaluator, count) if count > 1 else nullcontext(Here(evaluator))


@contextmanager
def _processes(evaluator: Evaluator, count: int) -> Iterator[Workers]:
    evaluator.at_once = count
    if not (forks := _may_fork(evaluator)):
        _check_tasks(evaluator)
        _check_shared_memory(evaluator)
    start = _forked if forks else _spawned
    with ExitStack() as executors:
        # While its one thread scores, the thread that asks keeps the others busy.
        here = executors.enter_context(futures.ThreadPoolExecutor(1))
        starting = {}
        for _ in range(count - 1):
            other, up = start(evaluator)
            starting[up] = partial(executors.enter_context(other).submit, _evaluate)
        yield Processes([partial(here.submit, evaluator)], starting)


def _may_fork(evaluator: Evaluator) -> bool:
    """Whether forked processes can do the work of this one."""
    import torch

    return (
        sys.platform == "linux"
        and evaluator.pool.device.type == "cpu"
        and evaluator.num_threads == 1
        and not torch.cuda.is_initialized()
    )


def _forked(evaluator: Evaluator) -> tuple[futures.Executor, futures.Future[None]]:
    """A process with this one's memory, and what ends when it is up."""
    context = multiprocessing.get_context("fork")
    executor = futures.ProcessPoolExecutor(1, context, initializer=_begin, initargs=(evaluator,))
    with warnings.catch_warnings():
        # That this process has threads: those of BLAS, of a progress bar; a worker needs neither.
        warnings.simplefilter("ignore", DeprecationWarning)
        return executor, executor.submit(_do_nothing)


def _spawned(evaluator: Evaluator) -> tuple[futures.Executor, futures.Future[None]]:
    """A process that shares the pool, and what ends when it is up."""
    executor = futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    # As bytes: what a process is started with is waited for, and a queue's thread would pickle it while
    # trials run.
    return executor, executor.submit(_load, bytes(ForkingPickler.dumps(evaluator)))


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

    def evaluate(self, configuration: Configuration, spans: Spans) -> Outcome:
        return self._evaluator(configuration, spans)


def _submit_to(actor: Any, configuration: Configuration, spans: Spans) -> futures.Future[Outcome]:
    return actor.evaluate.remote(configuration, spans).future()


def _begin(evaluator: Evaluator) -> None:
    import torch

    global _evaluator
    end_with_parent()
    torch.set_num_threads(evaluator.num_threads)  # of which a forked process must never have two
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    _evaluator = evaluator


def _load(evaluator: bytes) -> None:
    _begin(pickle.loads(evaluator))


def _do_nothing() -> None: ...


def _evaluate(configuration: Configuration, spans: Spans) -> Outcome:
    assert _evaluator is not None
    return _evaluator(configuration, spans)


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
