"""The runner on toy stages: order, reuse, failure, resumption. Real stages have tests of their own."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import InputError, MissingExtraError
from weightsmith.recipes import stages
from weightsmith.recipes.executors import Inline
from weightsmith.recipes.runner import RunFailed, run_recipe
from weightsmith.recipes.stages.contract import Done, Forecast, plain, references_in
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.runs import FolderLock, Prediction, derive, read_lines, write_json

RAN: list[str] = []
SPECS = [TensorSpec("w", "F32", (4,))]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Adds `value` to the sum of its models, in two durable steps; stops between them while `stop` exists."""

    models: tuple[str, ...] = ()
    value: float = 0.0
    fail: str = ""
    stop: str = ""
    kind: ClassVar[str] = "toy"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = False
    needs_transformers: ClassVar[bool] = False

    def references(self):
        return list(references_in(self.models, "models"))

    def problems(self):
        return []

    def identity(self):
        return plain(self)

    def completed(self, earlier):
        return self

    def data_fingerprint(self):
        return ""

    def forecast(self, models, workspace):
        folder = write_standin(
            workspace.checkpoint, SPECS, side_files={"config.json": b"{}"}, lineage=Lineage("toy")
        )
        return Forecast(Prediction(1_000_000, folder_bytes(folder), 1.0 + self.value), folder)

    def run(self, models, workspace, progress):
        RAN.append(workspace.stage)
        if self.fail:
            raise InputError(self.fail)
        half = workspace.work / "half.json"
        if half.exists():
            RAN[-1] += " (second half)"
        write_json(half, {"seed": workspace.seed})
        if self.stop and Path(self.stop).exists():
            raise KeyboardInterrupt
        total = self.value
        for path in models.values():
            with Checkpoint.open(path) as model:
                total += model.read("w")[0]
        files = {"config.json": b"{}"}
        lineage = Lineage("toy")
        with CheckpointWriter(
            workspace.checkpoint, SPECS, side_files=files, lineage=lineage, overwrite=True
        ) as writer:
            writer.write("w", np.full(4, total, np.float32))
            writer.commit()
        return Done({"checkpoint": "checkpoint"}, plain(self))


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setitem(stages.KINDS, "toy", f"{__name__}:Toy")
    RAN.clear()


@pytest.fixture
def run(tmp_path):
    def go(text, **more):
        page = tmp_path / "toy.yaml"
        page.write_text(text)
        RAN.clear()
        return run_recipe(page, root=tmp_path / "runs", executor=Inline(), **more)

    return go


PAGE = """
stages:
  base: {toy: {value: 1}}
  left: {toy: {models: [base], value: 10}}
  right: {toy: {models: [base], value: 100}}
  both: {toy: {models: [left, right]}}
"""


def weight(result, stage):
    with Checkpoint.open(result.folder / "stages" / stage / "checkpoint") as model:
        return float(model.read("w")[0])


def statuses(result):
    return {stage.stage: stage.status for stage in result.stages}


def test_stages_run_once_in_an_order_that_fits_and_long_chains_first(run):
    result = run(PAGE)
    assert RAN == ["base", "right", "left", "both"]
    assert weight(result, "both") == 112
    assert set(statuses(result).values()) == {"finished"}
    assert {path.name for path in result.folder.iterdir()} >= {
        "recipe.yaml",
        "environment.json",
        "ledger.jsonl",
        "stages",
    }
    again = run(PAGE)
    assert RAN == []
    assert set(statuses(again).values()) == {"reused"}


def test_a_finished_stage_keeps_its_outputs_and_its_record_and_nothing_else(run):
    result = run(PAGE)
    stage = result.folder / "stages" / "left"
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint", "stage.json"]
    record = json.loads((stage / "stage.json").read_text())
    assert record["stage"] == "left"
    assert record["kind"] == "toy"
    assert record["config"] == {"models": ["base"], "value": 10.0, "fail": "", "stop": ""}
    assert record["outputs"] == {"checkpoint": "checkpoint"}
    assert list(record["inputs"]) == ["base"]
    assert record["peak_bytes"] > 1_000_000


def test_an_edit_reruns_the_stage_and_what_depends_on_it(run):
    run(PAGE)
    result = run(PAGE.replace("value: 10}", "value: 20}"))
    assert RAN == ["left", "both"]
    assert weight(result, "both") == 122


def test_a_stage_that_comes_out_the_same_leaves_what_depends_on_it_alone(run):
    run(PAGE)
    result = run(PAGE.replace("models: [base], value: 10}", "models: [base, base], value: 10}"))
    assert RAN == ["left"]
    assert statuses(result)["both"] == "reused"


def test_another_seed_reruns_everything_and_order_or_comments_nothing(run):
    run(PAGE)
    lines = PAGE.strip().splitlines()
    swapped = "\n".join(["# hello", lines[0], lines[1], lines[3], lines[2], lines[4]])
    run(swapped)
    assert RAN == []
    run("seed: 1\n" + PAGE)
    assert len(RAN) == 4


@pytest.mark.parametrize("damage", ["bit", "truncated", "config", "gone", "record"])
def test_a_damaged_output_is_noticed_and_made_again(run, damage):
    result = run(PAGE)
    stage = result.folder / "stages" / "left"
    weights = stage / "checkpoint" / "model.safetensors"
    if damage == "bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "config":
        (stage / "checkpoint" / "config.json").write_text('{"a": 1}')
    elif damage == "gone":
        weights.unlink()
    else:
        (stage / "stage.json").write_text("{")
    said = []
    again = run(PAGE, say=said.append)
    assert RAN == ["left"]
    assert weight(again, "both") == 112
    if damage != "record":
        assert "left: its outputs are damaged or incomplete" in "\n".join(said)


def test_a_failure_stops_what_depends_on_it_and_nothing_else(run):
    bad = PAGE.replace("value: 100}", "value: 100, fail: 'no luck'}")
    with pytest.raises(RunFailed) as caught:
        run(bad)
    assert str(caught.value) == "stage `right` failed: no luck; not started: both"
    assert caught.value.exit_code == 2
    assert statuses(caught.value.result) == {
        "base": "finished",
        "left": "finished",
        "right": "failed",
        "both": "skipped",
    }
    result = run(PAGE)
    assert RAN == ["right", "both"]
    assert weight(result, "both") == 112


def test_an_unforeseen_error_is_one_line_and_its_traceback_is_in_the_log(run, monkeypatch):
    def broken(self, models, workspace, progress):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(Toy, "run", broken)
    with pytest.raises(RunFailed) as caught:
        run("stages: {base: {toy: {}}}")
    log = caught.value.result.folder / "stages" / "base" / "log.txt"
    assert str(caught.value) == f"stage `base` failed: RuntimeError: two lines (traceback: {log})"
    assert caught.value.exit_code == 1
    assert "in broken" in log.read_text()


def test_a_stopped_stage_goes_on_from_its_durable_point(run, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    page = PAGE.replace("value: 10}", f"value: 10, stop: '{stop}'}}")
    with pytest.raises(KeyboardInterrupt):
        run(page)
    stop.unlink()
    result = run(page)
    assert RAN == ["left (second half)", "both"]
    assert weight(result, "both") == 112


def test_an_edited_stage_does_not_go_on_from_its_old_beginnings(run, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    page = PAGE.replace("value: 10}", f"value: 10, stop: '{stop}'}}")
    with pytest.raises(KeyboardInterrupt):
        run(page)
    stop.unlink()
    run(page.replace("value: 10,", "value: 11,"))
    assert RAN == ["left", "both"]


def test_a_second_run_waits_says_so_and_finds_everything_done(run, tmp_path):
    said, second = [], []
    waiting = threading.Event()

    def say(line):
        said.append(line)
        waiting.set()

    def go():
        second.append(run_recipe(tmp_path / "toy.yaml", root=tmp_path / "runs", executor=Inline(), say=say))

    (tmp_path / "toy.yaml").write_text(PAGE)
    with FolderLock(tmp_path / "runs" / "toy"):
        thread = threading.Thread(target=go)
        thread.start()
        assert waiting.wait(10)
        # Under the lock nothing of the second run may have touched the folder yet.
        assert [path.name for path in (tmp_path / "runs" / "toy").iterdir()] == [".lock"]
    thread.join(30)
    assert "toy is in use by process" in said[0]
    assert set(statuses(second[0]).values()) == {"finished"}
    assert set(statuses(run(PAGE)).values()) == {"reused"}


def test_the_ledger_tells_each_event_with_time_and_cost(run):
    result = run(PAGE)
    run(PAGE)
    events = read_lines(result.folder / "ledger.jsonl")
    assert [(event["event"], event["stage"]) for event in events[:2]] == [
        ("started", "base"),
        ("finished", "base"),
    ]
    assert [event["event"] for event in events[8:]] == ["reused"] * 4
    for key in ("kind", "fingerprint", "seconds", "peak_bytes", "time"):
        assert key in events[1]


def test_a_model_from_outside_is_opened_before_anything_starts(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    with pytest.raises(InputError, match="outside"):
        run(f"stages:\n  a: {{toy: {{value: 1}}}}\n  b: {{toy: {{models: [a, {outside}]}}}}\n")
    assert RAN == []


def test_a_missing_extra_is_told_before_anything_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "needs_transformers", True)
    said = r'^stage `a` needs transformers, which is not installed: pip install "weightsmith\[hf\]"$'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingExtraError, match=said):
            run("stages: {a: {toy: {}}}")
    assert RAN == []
    run("stages: {a: {toy: {}}}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert statuses(run("stages: {a: {toy: {}}}")) == {"a": "reused"}


def test_a_stages_seed_comes_from_the_recipes_seed_and_its_own_name(run):
    result = run("seed: 3\nstages: {a: {toy: {}}, b: {toy: {}}}")
    records = [json.loads((result.folder / "stages" / name / "stage.json").read_text()) for name in "ab"]
    assert [record["seed"] for record in records] == [derive(3, "a"), derive(3, "b")]
