"""Kill a run anywhere, start two at once: nothing is damaged, and the end is that of an undisturbed run."""

from __future__ import annotations

import functools
import multiprocessing
import random
import signal
import subprocess
import sys
import time

import pytest

from weightsmith.recipes import Inline, run_recipe
from weightsmith.recipes.record import is_intact, read_record
from weightsmith.runs import FolderLock, read_lines

pytest.importorskip("transformers")


@pytest.fixture
def warm(monkeypatch):
    """Starts runs of a recipe in forks of one process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightsmith.recipes.preload", "weightsmith.recipes.runner"])
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


@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(recipe, tmp_path, warm, results, kills):
    started = time.monotonic()
    undisturbed = warm(recipe, tmp_path / "undisturbed")
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
            process = warm(recipe, root)
            process.join(moments.uniform(0, seconds / 3) if killed < kills else None)
            if finished := process.exitcode is not None:
                assert process.exitcode == 0
                continue
            process.kill()
            process.join()
            killed += 1
            for stage in (root / "tiny" / "stages").glob("*/stage.json"):
                assert is_intact(stage.parent, read_record(stage.parent)), stage
        assert results(root / "tiny") == expected
    assert killed == kills


RUN = """
import logging, sys
from weightsmith.recipes import run_recipe
if __name__ == "__main__":
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


def test_two_runs_at_once_do_each_stage_once_and_agree_with_one_process(recipe, tmp_path, command, results):
    run_recipe(recipe, root=tmp_path / "inline", executor=Inline())
    both = [command(tmp_path / "runs") for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert any("is in use by process" in text for text in said)
    assert results(tmp_path / "runs" / "tiny") == results(tmp_path / "inline" / "tiny")
    ledger = read_lines(tmp_path / "runs" / "tiny" / "ledger.jsonl")
    finished = [event["stage"] for event in ledger if event["event"] == "finished"]
    reused = [event["stage"] for event in ledger if event["event"] == "reused"]
    assert sorted(finished) == sorted(reused) == ["base", "mean", "merged", "one", "scores", "two"]
    mean = next(event for event in ledger if event["event"] == "finished" and event["stage"] == "mean")
    assert mean["peak_bytes"] < 150_000_000  # no torch in a process that only averages


def test_stages_die_with_their_run_and_the_next_run_goes_on(recipe, tmp_path, command):
    page = recipe.read_text().replace("steps: 6", "steps: 4000").replace("save_every: 2", "save_every: 20")
    recipe.write_text(page)
    first = command(tmp_path / "runs")
    metrics = tmp_path / "runs" / "tiny" / "stages" / "base" / "metrics.jsonl"
    _until(lambda: len(read_lines(metrics)) >= 8)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with FolderLock(tmp_path / "runs" / "tiny", name=".locks/base"):  # held by the stage until it dies
        steps = len(read_lines(metrics))
        time.sleep(0.3)
        assert len(read_lines(metrics)) == steps
    second = command(tmp_path / "runs")
    assert "base: going on where it was stopped" in _lines_until(second, "going on")
    second.send_signal(signal.SIGKILL)
    second.wait()


def _until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _lines_until(process, word):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            break
    return "".join(lines)
