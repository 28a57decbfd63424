"""What a piece of work will cost, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one stage.

    Attributes:
        memory_bytes: Peak resident memory of the process that does it, the interpreter included.
        disk_bytes: Bytes of the finished output on disk.
        seconds: Wall time on this machine.
        scratch_bytes: Disk needed meanwhile, beside the output, and free again at the end.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float
    scratch_bytes: int = 0
