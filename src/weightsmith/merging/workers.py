"""Work on many parameters at once: tiles in forked processes, whole matrices on threads.

Problem  A merge by tiles is thousands of NumPy calls of some 10 microseconds. Each hands Python's lock over,
         and two threads of such calls wait for one another so often that they are hardly faster than one.
Method   Forked processes. They know all that this one knew at the moment of the fork, take the next item's
         number from a pipe that holds nothing else, and send back results, which must pickle. What they
         change stays theirs: work returns what the parent has to know. Whole matrices are few and long calls
         of torch, which must not be forked: those go on threads.
Ends     Workers are killed when the first one fails, when their parent is interrupted, and by the kernel when
         their parent is killed. One that is killed itself is a `SystemFault`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing import connection
from typing import Any, TypeVar

from weightsmith.errors import SystemFault
from weightsmith.merging.parameter import Parameter, Scratch
from weightsmith.runs.memory import count_helpers, peak_rss_bytes, reset_peak, rss_bytes
from weightsmith.runs.processes import end_with

T = TypeVar("T")
Tell = Callable[[float], None]
"""Reports progress."""
Work = Callable[[Any, Tell], Any]
"""What is done with one item."""
Key = Callable[[Any], Parameter]
"""The parameter of an item."""

_TELL_SECONDS = 0.05
# Forking is safe with what a worker does (NumPy and files), and only Linux kills it with its parent.
_CAN_FORK = sys.platform == "linux"


class Processes:
    """Up to `count` forked processes for each round of work; this process alone where there is too little.

    Args:
        count: Processes at once.
        tile_elements: Work of fewer elements a process is not worth a fork.
    """

    def __init__(self, count: int, tile_elements: int) -> None:
        self._count = count if _CAN_FORK else 1
        self._tile_elements = tile_elements
        self._scratch = Scratch()

    def each(self, work: Work, items: Sequence[Any], key: Key, told: Tell) -> list[Any]:
        """`work` of every item, largest parameter first; results in the order of the items.

        Args:
            work: Called with an item and a function that passes amounts of progress on to `told`.
            items: What to work on.
            key: The parameter of an item.
            told: Called in this process.

        Raises:
            SystemFault: a process was killed.
            BaseException: the first that `work` raised.
        """
        order = sorted(range(len(items)), key=lambda place: -key(items[place]).numel)
        elements = sum(key(item).numel for item in items)
        count = min(self._count, len(items), elements // self._tile_elements)
        results: list[Any] = [None] * len(items)
        if count <= 1:
            for place in order:
                key(items[place]).scratch = self._scratch
                results[place] = work(items[place], told)
            return results

        def one(number: int, tell: Tell, scratch: Scratch) -> tuple[int, Any]:
            place = order[number]
            key(items[place]).scratch = scratch
            return place, work(items[place], tell)

        for place, result in _forked(one, len(items), count, told):
            results[place] = result
        return results


def _forked(one: Callable[[int, Tell, Scratch], T], items: int, count: int, told: Tell) -> Iterator[T]:
    """The results of `one(number, ...)` for 0 <= number < items, as they come from `count` processes."""
    turn_out, turn_in = os.pipe()
    os.write(turn_in, (0).to_bytes(8, "little"))
    workers: dict[connection.Connection, int] = {}
    grown = 0
    try:
        for _ in range(count):
            receiver, sender = (connection.Connection(end) for end in os.pipe())
            parent = os.getpid()
            with warnings.catch_warnings():
                # That this process has threads: those of BLAS, of a progress bar; a worker needs neither.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _be_worker(one, items, (turn_out, turn_in), sender, parent)
            sender.close()
            workers[receiver] = pid
        while workers:
            for receiver in connection.wait(list(workers)):
                assert isinstance(receiver, connection.Connection)
                try:
                    kind, content = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    receiver.close()
                    _, status = os.waitpid(workers.pop(receiver), 0)
                    if status:
                        raise SystemFault(
                            f"a worker process ended early (status {os.waitstatus_to_exitcode(status)}; "
                            f"{-signal.SIGKILL} is the system's answer to a lack of memory)"
                        ) from None
                    continue
                if kind == "told":
                    told(content)
                elif kind == "done":
                    yield content
                elif kind == "grown":
                    grown += content
                    count_helpers(grown)
                else:
                    error, trace = content
                    raise error from RuntimeError(trace)
    finally:
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        for receiver, pid in workers.items():
            os.waitpid(pid, 0)
            receiver.close()
        os.close(turn_out)
        os.close(turn_in)


def _be_worker(
    one: Callable[[int, Tell, Scratch], Any],
    items: int,
    turn: tuple[int, int],
    sender: connection.Connection,
    parent: int,
) -> None:
    """A worker's life; never returns, so that nothing of what the parent meant to do next is done twice."""

    def send(kind: str, content: Any) -> None:
        sender.send_bytes(pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL))

    untold, told_at = 0.0, time.monotonic()

    def tell(amount: float) -> None:
        # Not each of thousands: a message takes the parent from whatever core it is on.
        nonlocal untold, told_at
        untold += amount
        if (now := time.monotonic()) - told_at >= _TELL_SECONDS:
            send("told", untold)
            untold, told_at = 0.0, now

    status = 1
    try:
        end_with(parent)
        # Garbage of the parent is its own to collect: freed here, it would be memory this process seems never
        # to have taken, and looking through it would copy its pages.
        gc.freeze()
        reset_peak()  # what earlier workers held is this process's parent's to count
        scratch, before = Scratch(), rss_bytes()
        while (number := int.from_bytes(os.read(turn[0], 8), "little")) < items:
            os.write(turn[1], (number + 1).to_bytes(8, "little"))
            send("done", one(number, tell, scratch))
        os.write(turn[1], items.to_bytes(8, "little"))
        send("told", untold)
        send("grown", max(0, peak_rss_bytes() - before))
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            send("failed", (error, traceback.format_exc()))
    finally:
        os._exit(status)


class Threads:
    """Threads that each keep their scratch buffers from item to item.

    Args:
        count: Threads at once.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def each(self, work: Work, items: Sequence[Any], key: Key, told: Tell) -> list[Any]:
        """As `Processes.each`; the first error stops what has not begun and waits for the rest."""
        stop, lock, local = threading.Event(), threading.Lock(), threading.local()

        def tell(amount: float) -> None:
            with lock:
                told(amount)

        def run(item: Any) -> Any:
            if stop.is_set():
                return None
            if not hasattr(local, "scratch"):
                local.scratch = Scratch()
            key(item).scratch = local.scratch
            try:
                return work(item, tell)
            except BaseException:
                stop.set()
                raise

        order = sorted(range(len(items)), key=lambda place: -key(items[place]).numel)
        with ThreadPoolExecutor(self._count, "merge") as pool:
            futures = {place: pool.submit(run, items[place]) for place in order}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
            return [futures[place].result() for place in range(len(items))]
