"""Processes that end with the one that started them, however that ends.

One that is killed can't tell its children. Left alone they hold memory and locks for good: a worker of an
executor waits for its next task on a pipe that it holds both ends of.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In a child that `multiprocessing` started, by whatever method: end with whoever asked for it."""
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def end_with(parent: int) -> None:
    """In a child of `os.fork` or `subprocess`: be killed with the thread that started it, on Linux.

    Args:
        parent: Its process. Where that has ended by now, so does this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
