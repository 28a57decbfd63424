"""Where stages run: in this process, or each in a process of its own that dies with this one.

A stage that needs torch and transformers is forked from a server that has imported them once (the import
costs 8 to 15 seconds of CPU); any other stage gets a fresh, small interpreter, so that an element-wise merge
never carries torch.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from weightsmith.errors import WeightsmithError
from weightsmith.recipes.record import LOG, Record
from weightsmith.recipes.worker import Job, execute
from weightsmith.runs.processes import end_with_parent
from weightsmith.runs.progress import Progress

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended: with a record, or with a message (one line) and an exit code."""

    stage: str
    record: Record | None = None
    message: str = ""
    exit_code: int = 1


class Executor(Protocol):
    """Runs jobs; the runner starts at most `jobs` at a time."""

    jobs: int

    def start(self, job: Job, progress: Progress, say: Callable[[str], None]) -> None:
        """Begin a stage; `progress` and `say` are called in this process."""
        ...

    def outcomes(self) -> Iterator[Outcome]:
        """Wait until at least one stage has ended; those that have."""
        ...

    def close(self) -> None:
        """Kill what still runs."""
        ...


class Inline:
    """One stage at a time in this process, when its outcome is asked for. For tests and debuggers."""

    jobs = 1

    def __init__(self) -> None:
        self._waiting: collections.deque[tuple[Job, Progress, Callable[[str], None]]] = collections.deque()

    def start(self, job: Job, progress: Progress, say: Callable[[str], None]) -> None:
        """Queue a stage."""
        self._waiting.append((job, progress, say))

    def outcomes(self) -> Iterator[Outcome]:
        """Run the oldest queued stage."""
        job, progress, say = self._waiting.popleft()
        try:
            yield Outcome(stage=job.stage, record=execute(job, progress, say))
        except Exception as error:
            log.debug("stage %s failed", job.stage, exc_info=True)
            yield _failed(job, error)

    def close(self) -> None:
        """Forget queued stages."""
        self._waiting.clear()


@dataclass
class _Running:
    job: Job
    process: Any
    events: Connection
    progress: Progress
    say: Callable[[str], None]


class Processes:
    """Each stage in a process of its own, `jobs` at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._running: list[_Running] = []

    def start(self, job: Job, progress: Progress, say: Callable[[str], None]) -> None:
        """Start the stage's process."""
        if job.config.needs_torch:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["weightsmith.recipes.preload"])
        else:
            context = multiprocessing.get_context("spawn")
        events, theirs = context.Pipe(duplex=False)
        # The job travels pickled, so that its classes are imported only after the child has limited its
        # threads.
        process = context.Process(
            target=_child, args=(pickle.dumps(job), str(job.folder / LOG), theirs), name=job.stage
        )
        with _bare_main():
            if job.config.needs_torch:
                with _no_interrupt():
                    forkserver.ensure_running()
                process.start()  # waits for the server's imports: not masked, so that Ctrl-C is heard
            else:
                with _no_interrupt():
                    process.start()
        theirs.close()
        self._running.append(_Running(job, process, events, progress, say))

    def outcomes(self) -> Iterator[Outcome]:
        """Pass on progress until a stage has ended."""
        while self._running:
            ended = []
            ready = wait([run.events for run in self._running])
            for run in [run for run in self._running if run.events in ready]:
                if outcome := self._receive(run):
                    ended.append(outcome)
                    self._running.remove(run)
            if ended:
                yield from ended
                return

    def close(self) -> None:
        """Kill the stages that still run; what they have made durable stays."""
        for run in self._running:
            run.process.kill()
        for run in self._running:
            run.process.join()
            run.events.close()
        self._running.clear()

    def _receive(self, run: _Running) -> Outcome | None:
        try:
            kind, *content = run.events.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            run.process.join()
            return Outcome(stage=run.job.stage, message=_death(run.process.exitcode, run.job.folder / LOG))
        if kind in ("start", "advance", "done"):
            getattr(run.progress, kind)(*content)
            return None
        if kind == "say":
            run.say(*content)
            return None
        run.process.join()
        run.events.close()
        return content[0]


@contextlib.contextmanager
def _bare_main() -> Iterator[None]:
    """Keep children from importing the program that started them: they need nothing of it, and it may lack a
    guard against being run again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to the whole group, from children: the parent kills them and tells
    the user. They inherit the mask, and theirs do, so not even imports are interrupted with a traceback.
    """
    resource_tracker.ensure_running()  # it would lift the mask when started inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(pickled: bytes, log_file: str, events: Connection) -> None:
    """The whole life of a stage's process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # counts only before numpy and torch load
    end_with_parent()  # the next run of the recipe wants this stage's folder
    _redirect_output(Path(log_file))
    sender = _Sender(events)
    job: Job = pickle.loads(pickled)
    try:
        outcome = Outcome(stage=job.stage, record=execute(job, sender, sender.say))
    except Exception as error:
        outcome = _failed(job, error)
    sender.send("ended", outcome)


def _redirect_output(log_file: Path) -> None:
    """Send what libraries print to the stage's log; the terminal belongs to the runner."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class _Sender:
    """Progress through a pipe, at most ten messages a second; safe to call from several threads."""

    def __init__(self, events: Connection) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._pending = 0.0
        self._sent = 0.0

    def send(self, *message: Any) -> None:
        with self._lock:
            self._events.send(message)

    def say(self, line: str) -> None:
        self.send("say", line)

    def start(self, label: str, total: float, unit: str) -> None:
        self._pending = 0.0
        self.send("start", label, total, unit)

    def advance(self, amount: float) -> None:
        with self._lock:
            self._pending += amount
            now = time.monotonic()
            if now - self._sent >= PROGRESS_SECONDS:
                self._events.send(("advance", self._pending))
                self._pending, self._sent = 0.0, now

    def done(self) -> None:
        with self._lock:
            if self._pending:
                self._events.send(("advance", self._pending))
                self._pending = 0.0
            self._events.send(("done",))


def _failed(job: Job, error: Exception) -> Outcome:
    """An error as one line and an exit code; what nobody foresaw keeps its traceback in the stage's log."""
    if isinstance(error, WeightsmithError):
        return Outcome(stage=job.stage, message=str(error), exit_code=error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return Outcome(stage=job.stage, message=f"{place}{error.strerror.lower()}")
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOG, "a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    what = " ".join(str(error).split())
    return Outcome(stage=job.stage, message=f"{type(error).__name__}: {what} (traceback: {job.folder / LOG})")


def _death(exit_code: int | None, log_file: Path) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed (signal 9), as the system does when memory runs out"
    how = f"died of signal {-exit_code}" if exit_code and exit_code < 0 else f"ended early (code {exit_code})"
    return f"its process {how}; what it printed: {log_file}"
