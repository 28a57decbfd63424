"""Kill a run anywhere, start two at once: nothing is damaged, and the end is that of an undisturbed run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from weightsmith.recipes import Inline, run_recipe
from weightsmith.recipes.record import is_intact, read_record
from weightsmith.recipes.standin import folder_bytes
from weightsmith.runs import FolderLock, read_lines

pytest.importorskip("transformers")


@pytest.fixture
def warm(monkeypatch):
    """Starts runs of a recipe in forks of one process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    parts = ["preload", "page", "runner", "executors", "stages.average"]
    context.set_forkserver_preload(["ruamel.yaml", *(f"weightsmith.recipes.{part}" for part in parts)])
    # Children would import pytest over again to have the same `__main__`.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)

    def start(recipe, root):
        process = context.Process(
            target=functools.partial(run_recipe, recipe, root=root, executor=Inline()), daemon=True
        )
        process.start()
        return process

    return start


SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=SLOW)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(
    any_recipe, tmp_path, warm, results, kills
):
    warm(any_recipe, tmp_path / "first").join()  # starts the server, which takes longer than a run
    started = time.monotonic()
    undisturbed = warm(any_recipe, tmp_path / "undisturbed")
    undisturbed.join()
    seconds = time.monotonic() - started
    expected = results(tmp_path / "undisturbed" / "tiny")
    assert undisturbed.exitcode == 0
    assert {"stages/scores/scores.json", "stages/merged/checkpoint/model.safetensors"} <= expected.keys()

    moments = random.Random(0)
    killed = rounds = 0
    while killed < kills:
        root = tmp_path / f"round-{rounds}"
        rounds += 1
        finished = False
        while not finished:
            process = warm(any_recipe, root)
            process.join(moments.uniform(0, seconds / 2) if killed < kills else None)
            if finished := process.exitcode is not None:
                assert process.exitcode == 0
                continue
            process.kill()
            process.join()
            killed += 1
            for stage in (root / "tiny" / "stages").glob("*/stage.json"):
                assert is_intact(stage.parent, read_record(stage.parent)), stage
        assert differing(results(root / "tiny"), expected) == []
    assert killed == kills


def differing(found, expected):
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


# Without the guard that multiprocessing usually asks for: a user's script or notebook has none either.
RUN = """
import sys
from weightsmith.recipes import run_recipe
run_recipe(sys.argv[1], root=sys.argv[2], jobs=2, say=lambda line: print(line, flush=True))
"""


@pytest.fixture
def command(recipe, tmp_path):
    """Starts a run as a program of its own, stages in processes of theirs."""
    script = tmp_path / "run.py"
    script.write_text(RUN)

    def start(root):
        words = [sys.executable, str(script), str(recipe), str(root)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_stages_die_with_their_run_and_two_runs_at_once_share_the_rest_at_the_predicted_cost(
    recipe, tmp_path, warm, command, results
):
    recipe.write_text(recipe.read_text().replace("steps: 6", "steps: 80, log_every: 2"))
    undisturbed = warm(recipe, tmp_path / "undisturbed")
    run = tmp_path / "runs" / "tiny"
    first = command(tmp_path / "runs")
    metrics = run / "stages" / "base" / "metrics.jsonl"
    _until(lambda: len(read_lines(metrics)) >= 5)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with FolderLock(run, name=".locks/base"):  # held by the stage's process until it has died
        assert not (run / "stages" / "base" / "stage.json").exists()
        steps = len(read_lines(metrics))
        time.sleep(0.2)
        assert len(read_lines(metrics)) == steps

    both = [command(tmp_path / "runs") for _ in range(2)]
    said = [process.communicate(timeout=250)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("is in use by process" in text for text in said) == 1
    assert sum("base: going on where it was stopped" in text for text in said) == 1, said
    ledger = read_lines(run / "ledger.jsonl")
    finished = [event["stage"] for event in ledger if event["event"] == "finished"]
    reused = [event["stage"] for event in ledger if event["event"] == "reused"]
    assert sorted(finished) == sorted(reused) == ["base", "mean", "merged", "one", "scores", "two"]
    mean = next(event for event in ledger if event["event"] == "finished" and event["stage"] == "mean")
    assert mean["peak_bytes"] < 150_000_000  # no torch in a process that only averages
    for record in map(read_record, sorted((run / "stages").iterdir())):
        if "checkpoint" in record.outputs:
            assert (
                folder_bytes(run / "stages" / record.stage / "checkpoint") == record.predicted["disk_bytes"]
            )
        assert record.peak_bytes / 1.3 < record.predicted["memory_bytes"] < record.peak_bytes * 1.3, record
    undisturbed.join()
    assert differing(results(run), results(tmp_path / "undisturbed" / "tiny")) == []


@pytest.mark.parametrize("moment", ["imports", "steps"])
def test_ctrl_c_ends_a_run_and_its_stages_with_one_line(recipe, tmp_path, moment):
    recipe.write_text(recipe.read_text().replace("steps: 6", "steps: 5000, log_every: 1"))
    words = [sys.executable, "-c", "from weightsmith.cli.main import main; main()", "run", str(recipe)]
    # A terminal sends Ctrl-C to the whole group: to the server that stages are forked from, too.
    run = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stages = tmp_path / "runs" / "tiny" / "stages"
    if moment == "imports":
        _until(lambda: (tmp_path / "runs" / "tiny" / "ledger.jsonl").exists())
        time.sleep(0.5)
    else:
        _until(lambda: read_lines(stages / "base" / "metrics.jsonl"))
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)[1]  # until the last of the group has closed it
    assert said == "error: interrupted; run the same command again to go on\n"
    assert run.returncode == 130
    assert not (stages / "base" / "stage.json").exists()


def _until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
