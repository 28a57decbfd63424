"""Memory of this process."""

from __future__ import annotations

import contextlib
import os
import resource
import sys

_helpers = 0
"""What helper processes held beside this one."""


def count_helpers(size: int) -> None:
    """Take note that forked helpers held `size` bytes of their own at once."""
    global _helpers
    _helpers = max(_helpers, size)


def peak_rss_bytes() -> int:
    """Largest resident set this process has had, mapped pages included, and that of its forked helpers.

    Linux's `ru_maxrss` survives `exec`: a small child of a large parent reports the parent's size. `VmHWM` is
    the same quantity of the present program only, so it is preferred where there is one.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 + _helpers
    except OSError:
        pass  # not Linux: the portable counter below is right there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) + _helpers


def rss_bytes() -> int:
    """Resident set of this process now; its peak where the system doesn't tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as sizes:
            return int(sizes.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss_bytes()


def reset_peak() -> None:
    """Let `peak_rss_bytes` count from now on, where the system can (Linux); elsewhere it goes on counting."""
    global _helpers
    _helpers = 0
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")


def free_bytes() -> int:
    """Bytes that can be had without swapping; caches count as free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as facts:
            for line in facts:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
