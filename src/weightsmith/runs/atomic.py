"""Files that are whole or absent, and ledgers whose finished lines survive a kill.

A file is written to a sibling with a temporary name, flushed to the disk and renamed over the target: a
reader sees the old content or the new one. A ledger is one JSON object per line; a kill can tear its last
line only, which readers skip and the next writer cuts off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError, SystemFault


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, in one step; missing parent folders are made.

    Raises:
        SystemFault: no space, no permission; the old file is untouched.
    """
    path = Path(path)
    with system_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp's 0600 would hide the file from a team
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), in one step. Raises as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON that keeps the order of keys. Raises as `write_bytes`.

    NaN and infinities are refused (`ValueError`): other languages' readers don't take them.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is not JSON; names the file and the line.
        SystemFault: it can't be read.
    """
    path = Path(path)
    with system_faults(path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as problem:
        raise InputError(f"{path}: not valid JSON: {problem}") from problem


def append_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON and wait until the disk has it; a torn last line is cut off first.

    Safe with several writers: each holds a lock on the file while it writes.

    Raises:
        SystemFault: no space, no permission.
    """
    path = Path(path)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    with system_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _end_of_last_whole_line(descriptor)
            if end != os.fstat(descriptor).st_size:
                os.ftruncate(descriptor, end)
            written = 0
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], end + written)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: str | Path) -> list[Any]:
    """The objects of a JSONL file, in order; no file is an empty list, a torn last line is not there yet.

    Raises:
        InputError: a finished line is not JSON; names the file and the line.
        SystemFault: the file can't be read.
    """
    path = Path(path)
    with system_faults(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
    values = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            values.append(json.loads(line))
        except ValueError as problem:
            raise InputError(f"{path}:{number}: not a line of JSON: {problem}") from problem
    return values


@contextlib.contextmanager
def system_faults(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a one-line `SystemFault` that names `path`."""
    try:
        yield
    except SystemFault:
        raise
    except OSError as fault:
        raise SystemFault(f"{fault.filename or path}: {(fault.strerror or str(fault)).lower()}") from fault


def sync_folder(path: str | Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _end_of_last_whole_line(descriptor: int) -> int:
    """Offset after the last newline; looks backwards, so that long ledgers are not read whole."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once at import, before there are threads that could create files in between
