"""One merge in a process of its own.

Time and peak memory that it reports are those of this merge and of nothing that ran before it, torch is
loaded only by the methods that need it, and a merge that the system kills for its memory takes nothing along.
The process gets one line of JSON and answers in lines of JSON; it dies with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith import errors
from weightsmith.errors import SystemFault, WeightsmithError
from weightsmith.runs.processes import end_with
from weightsmith.runs.progress import Progress


class EndedEarlyError(SystemFault):
    """The process of a merge ended without an answer."""


def merge_apart(
    body: Mapping[str, Any],
    out: Path,
    *,
    device: str,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Merge in another process.

    Args:
        body: A page, as plain JSON.
        out: Folder to make; replaced where it exists.
        device: Where spectral methods compute.
        threads: Workers at once.
        progress: Told what is done.

    Returns:
        The summary of the merge's report, with "tensors": what spectral methods report.

    Raises:
        WeightsmithError: the one that the merge raised.
        EndedEarlyError: the process was killed.
    """
    request = {"body": body, "out": str(out), "device": device, "threads": threads, "parent": os.getpid()}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answer: Any = None
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(request))
        for line in process.stdout:
            kind, content = json.loads(line)
            if kind in ("start", "advance", "done"):
                getattr(progress, kind)(*content)
            else:
                answer = kind, content
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if answer is None:
        raise EndedEarlyError(
            f"{out}: the process that merged it ended early (status {process.returncode}; "
            f"{-signal.SIGKILL} is the system's answer to a lack of memory)"
        )
    kind, content = answer
    if kind == "report":
        return content
    raise getattr(errors, content["type"], WeightsmithError)(content["text"])


class _Told:
    """Progress as lines on a pipe."""

    def __init__(self, send: Any) -> None:
        self._send = send

    def start(self, label: str, total: float, unit: str) -> None:
        self._send("start", (label, total, unit))

    def advance(self, amount: float) -> None:
        self._send("advance", (amount,))

    def done(self) -> None:
        self._send("done", ())


def _main() -> None:
    request = json.loads(sys.stdin.read())
    end_with(request["parent"])
    # What libraries print must not get between the lines.
    pipe, sys.stdout = sys.stdout, sys.stderr

    def send(kind: str, content: Any) -> None:
        print(json.dumps([kind, content]), file=pipe, flush=True)

    from weightsmith.merging.api import merge

    try:
        report = merge(
            request["body"],
            request["out"],
            device=request["device"],
            threads=request["threads"],
            progress=_Told(send),
            overwrite=True,
        )
        send("report", {**report.summary(), "tensors": report.tensors})
    except WeightsmithError as problem:
        known = next(kind for kind in type(problem).__mro__ if hasattr(errors, kind.__name__))
        send("error", {"type": known.__name__, "text": str(problem)})


if __name__ == "__main__":
    _main()
