"""Forked workers: results in order, one error for all, and nobody left behind."""

import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, SystemFault
from weightsmith.merging.parameter import Parameter
from weightsmith.merging.workers import Processes, Threads
from weightsmith.runs.memory import peak_rss_bytes, reset_peak, rss_bytes

from ..processes import alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers fork on Linux only")


def parameters(*sizes):
    def read(start, stop, out):
        out[:] = 1

    return [Parameter(f"w{i}", (size,), models=["m"], readers=[read]) for i, size in enumerate(sizes)]


def each(crew, work, items, told=lambda amount: None):
    return crew.each(work, items, lambda item: item, told)


@pytest.mark.parametrize(
    "crew", [Processes(3, 1), Processes(1, 1), Threads(3)], ids=["forked", "alone", "threads"]
)
def test_results_keep_the_order_of_the_items_and_progress_arrives(crew):
    amounts = []

    def work(parameter, tell):
        for tile in parameter.tiles():
            tell(float(tile.numel))
        return parameter.name, np.arange(parameter.numel)

    found = each(crew, work, parameters(5, 900_000, 70, 1), amounts.append)
    assert [(name, values.size) for name, values in found] == [
        ("w0", 5),
        ("w1", 900_000),
        ("w2", 70),
        ("w3", 1),
    ]
    assert sum(amounts) == 900_076


def test_work_is_spread_over_processes_other_than_this_one_unless_it_is_little():
    def work(parameter, tell):
        time.sleep(0.05)
        return os.getpid()

    spread = each(Processes(2, 10), work, parameters(10, 10, 10, 10))
    assert len(set(spread)) == 2
    assert os.getpid() not in spread
    assert each(Processes(2, 10), work, parameters(9, 9)) == [os.getpid()] * 2


@pytest.mark.parametrize("crew", [Processes(2, 1), Threads(2)], ids=["forked", "threads"])
def test_the_first_error_is_raised_as_it_was_and_ends_the_others(crew):
    def work(parameter, tell):
        if parameter.numel == 2:
            raise CheckpointError("m1: w is broken")
        time.sleep(0.01)

    before = children()
    with pytest.raises(CheckpointError, match=r"^m1: w is broken$"):
        each(crew, work, parameters(1, 2, 3, 1))
    assert children() == before


def test_a_worker_that_is_killed_is_a_fault_of_the_system_and_ends_the_others():
    def work(parameter, tell):
        if parameter.numel == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    before = children()
    with pytest.raises(SystemFault, match=r"a worker process ended early \(status -9"):
        each(Processes(2, 1), work, parameters(2, 3))
    assert children() == before


def test_workers_die_with_their_parent(tmp_path):
    code = (
        "import os, sys, time\n"
        "from weightsmith.merging.parameter import Parameter\n"
        "from weightsmith.merging.workers import Processes\n"
        "def work(parameter, tell):\n"
        "    open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close()\n"
        "    time.sleep(60)\n"
        "items = [Parameter(n, (1,), models=['m'], readers=[None]) for n in 'ab']\n"
        "Processes(2, 1).each(work, items, lambda item: item, print)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path]) as parent:
        wait_until(lambda: len(os.listdir(tmp_path)) == 2)
        parent.kill()
    wait_until(lambda: not any(alive(int(pid)) for pid in os.listdir(tmp_path)))


def test_memory_of_workers_counts_as_that_of_their_parent_whose_garbage_stays():
    def work(parameter, tell):
        gc.collect()
        held = np.ones(100 << 20, np.uint8)
        time.sleep(0.05)
        return int(held[0])

    garbage = [np.ones(150 << 20, np.uint8)]
    garbage.append(garbage)
    del garbage  # until it is collected
    reset_peak()
    before = peak_rss_bytes()
    each(Processes(2, 1), work, parameters(1, 1))
    assert 190e6 < peak_rss_bytes() - before < 260e6
    reset_peak()


def children():
    """This process's children; other tests may have left servers that fork stages."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as pids:
        return pids.read().split()


def test_memory_of_one_round_of_workers_is_not_counted_again_in_the_next():
    def work(parameter, tell):
        return float(np.ones(4_000_000).sum())  # 32 MB

    reset_peak()
    for _ in range(6):
        each(Processes(2, 10), work, parameters(10, 10))
    assert peak_rss_bytes() - rss_bytes() < 300e6  # counted again each time: 2 GB
