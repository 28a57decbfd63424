"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_rss_bytes() -> int:
    """Largest resident set this process has had, mapped pages included.

    Linux's `ru_maxrss` survives `exec`: a small child of a large parent reports the parent's size. `VmHWM` is
    the same quantity of the present program only, so it is preferred where there is one.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the portable counter below is right there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
