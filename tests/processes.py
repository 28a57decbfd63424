"""Looking at other processes."""

import time


def alive(pid):
    """Whether a process runs: one that has ended stays until its parent has asked for its status."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as facts:
            return facts.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true):
    """Until a function returns something true, up to half a minute."""
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never came about")
