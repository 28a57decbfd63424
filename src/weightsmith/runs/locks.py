"""One writer per folder: an advisory lock that dies with its process.

`flock` is released by the kernel when the holder ends, however it ends, so a killed run never leaves a stale
lock. The lock file stays behind (deleting it would let two waiters hold two different files) and names its
holder for those who wait.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from weightsmith.runs.atomic import system_faults

log = logging.getLogger(__name__)


class FolderLock:
    """Hold `folder` alone, as a context manager; a second holder waits.

    Args:
        folder: Folder to hold; made when it is missing.
        name: File inside the folder that carries the lock, sub-folders allowed. Different names are different
            locks.
        on_wait: Called once with a line that names the lock and its holder when someone else has it; the
            default logs it.

    Example:
        >>> with FolderLock(tmp_path) as lock:
        ...     lock.waited
        False
    """

    def __init__(
        self, folder: str | Path, *, name: str = ".lock", on_wait: Callable[[str], None] | None = None
    ) -> None:
        self.path = Path(folder) / name
        self.folder = Path(folder)
        self.waited = False
        self._on_wait = on_wait or log.warning
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        with system_faults(self.path):
            while self._descriptor is None:
                self._descriptor = self._acquire()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _acquire(self) -> int | None:
        """The locked descriptor, or None when the file was deleted or replaced while we waited for it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self.waited:
                    self.waited = True
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                    by = f"process {holder}" if holder else "another process"
                    self._on_wait(f"{self.folder} is in use by {by}: waiting until it is done")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            held, named = os.fstat(descriptor), _stat(self.path)
            if named is not None and (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
