"""Processes that end with the one that started them."""

import subprocess
import sys

import pytest

from ..processes import alive, wait_until

SERVED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from weightsmith.runs.processes import end_with_parent

def wait(seconds):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    time.sleep(seconds)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(2, context, initializer=end_with_parent) as pool:
        list(pool.map(wait, [float(sys.argv[2])] * 2))
        wait(60)
"""


@pytest.mark.parametrize("seconds", [60, 0], ids=["busy", "idle"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_of_a_pool_end_with_a_process_that_is_killed(method, seconds, tmp_path):
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    command = [sys.executable, str(script), method, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            pids = [int(parent.stdout.readline()) for _ in range(2 if seconds else 3)]
        finally:
            parent.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))
