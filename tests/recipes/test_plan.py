"""A plan tells what a run will do, starts nothing and writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import PageError, SystemFault
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe
from weightsmith.recipes.plan import RunPlan, StagePlan, chains
from weightsmith.recipes.standin import folder_bytes
from weightsmith.runs import Prediction, write_json


def checkpoint(folder, rows=8, seed=0, **config):
    specs = [
        TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (rows, 16)),
        TensorSpec("w", "F32", (5,)),
    ]
    files = {"config.json": json.dumps({"model_type": "llama", "vocab_size": 10, **config}).encode()}
    values = np.random.default_rng(seed)
    lineage = Lineage("made for a test")
    with CheckpointWriter(folder, specs, side_files=files, lineage=lineage) as writer:
        for spec in specs:
            writer.write(spec.name, values.standard_normal(spec.numel, np.float32))
        writer.commit()
    return folder


@pytest.fixture
def merges(tmp_path):
    """A page of stages that need no training, on three models from outside."""
    for number, name in enumerate(("base", "one", "two")):
        checkpoint(tmp_path / name, seed=number)
    page = tmp_path / "merges.yaml"
    models, base = f"{tmp_path}/one, {tmp_path}/two", f"base: {tmp_path}/base"
    page.write_text(
        "stages:\n"
        f"  mean: {{average: {{models: [{models}]}}}}\n"
        f"  sum: {{merge: {{method: task_arithmetic, lambda: 0.5, {base}, models: [{models}]}}}}\n"
        f"  again: {{merge: {{method: ties, {base}, models: [mean, sum], dtype: bfloat16}}}}\n"
    )
    return page


def test_sizes_are_exact_through_a_chain_of_checkpoints_that_do_not_exist_yet(merges, tmp_path):
    plan = plan_run(merges, root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert [stage.status for stage in plan.stages] == ["run", "run", "run"]
    result = run_recipe(merges, root=tmp_path / "runs", plan=plan, executor=Inline())
    for stage in plan.stages:
        assert folder_bytes(stage.writes / "checkpoint") == stage.prediction.disk_bytes
    record = json.loads((result.folder / "stages" / "again" / "stage.json").read_text())
    assert record["predicted"]["disk_bytes"] == plan.stages[2].prediction.disk_bytes


def test_a_plan_knows_what_is_done_what_was_begun_and_what_an_edit_reruns(merges, tmp_path):
    def statuses():
        return [stage.status for stage in plan_run(merges, root=tmp_path / "runs").stages]

    run_recipe(merges, root=tmp_path / "runs", executor=Inline())
    assert statuses() == ["reuse", "reuse", "reuse"]
    stage = tmp_path / "runs" / "merges" / "stages" / "again"
    fingerprint = json.loads((stage / "stage.json").read_text())["fingerprint"]
    (stage / "stage.json").unlink()
    write_json(stage / "started.json", {"fingerprint": fingerprint})
    assert statuses() == ["reuse", "reuse", "resume"]
    merges.write_text(merges.read_text().replace("lambda: 0.5", "lambda: 0.6"))
    assert statuses() == ["reuse", "run", "run"]


def test_a_finished_stage_costs_nothing_more_and_tells_what_it_took(merges, tmp_path):
    run_recipe(merges, root=tmp_path / "runs", executor=Inline())
    plan = plan_run(merges, root=tmp_path / "runs")
    assert plan.total == Prediction(0, 0, 0.0)
    assert all(stage.prediction.memory_bytes > 1_000_000 for stage in plan.stages)


def test_work_done_here_before_is_predicted_from_what_it_took(merges, tmp_path):
    run_recipe(merges, root=tmp_path / "runs", executor=Inline())
    stage = tmp_path / "runs" / "merges" / "stages" / "sum"
    record = json.loads((stage / "stage.json").read_text())
    write_json(stage / "stage.json", {**record, "seconds": 1234.5, "peak_bytes": 99, "fingerprint": "older"})
    planned = {entry.stage: entry for entry in plan_run(merges, root=tmp_path / "runs").stages}["sum"]
    assert planned.status == "run"
    assert (planned.prediction.seconds, planned.prediction.memory_bytes) == (1234.5, 99)


def test_models_that_do_not_fit_are_told_with_the_stages_line_before_anything_starts(merges, tmp_path):
    checkpoint(tmp_path / "wide", rows=9)
    merges.write_text(merges.read_text().replace(f"{tmp_path}/two", f"{tmp_path}/wide"))
    with pytest.raises(PageError, match=r"merges\.yaml:2: stages\.mean: .*\[9, 16\]"):
        run_recipe(merges, root=tmp_path / "runs", executor=Inline())
    assert not (tmp_path / "runs").exists()


def test_a_run_that_does_not_fit_the_disk_is_not_started(merges, tmp_path, monkeypatch):
    plan = plan_run(merges, root=tmp_path / "runs")
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:3], 0, 0, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda place: full)
    with pytest.raises(SystemFault, match="nothing was started"):
        run_recipe(merges, root=tmp_path / "runs", plan=plan, executor=Inline())
    assert not (tmp_path / "runs").exists()


def test_the_time_of_a_run_is_that_of_its_longest_chain_on_so_many_workers():
    def stage(name, seconds, *needs):
        return StagePlan(
            stage=name,
            kind="toy",
            status="run",
            needs=needs,
            reads=(),
            writes=Path(name),
            prediction=Prediction(int(seconds), 1, seconds),
        )

    stages = (
        stage("base", 10.0),
        stage("short", 4.0, "base"),
        stage("other", 4.0, "base"),
        stage("long", 9.0, "base"),
        stage("merge", 1.0, "short", "other"),
    )
    assert chains(stages)["base"] == 19.0
    plans = [RunPlan(name="toy", folder=Path(), jobs=jobs, stages=stages) for jobs in (1, 2, 3)]
    # On two workers `long` begins with `short`; `other` follows `short`; the merge ends with `long`.
    assert [plan.total.seconds for plan in plans] == [28.0, 19.0, 19.0]
    assert [plan.total.memory_bytes for plan in plans] == [10, 19, 23]
    assert plans[0].total.disk_bytes == 5


def test_planning_every_kind_of_stage_imports_no_torch_and_is_exact_about_training(recipe, tmp_path):
    code = (
        "import sys; from weightsmith.recipes import plan_run; "
        "plan = plan_run(sys.argv[1], root=sys.argv[2]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules))); "
        "print(*[stage.prediction.disk_bytes for stage in plan.stages])"
    )
    command = [sys.executable, "-c", code, str(recipe), str(tmp_path / "runs")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "[]"
    assert not (tmp_path / "runs").exists()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    weights = 4 * (2 * 100 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16)
    assert config["num_hidden_layers"] == 2
    assert int(said[1].split()[0]) > weights + folder_bytes(tmp_path / "model")


def test_what_a_stage_reads_and_writes_is_told_in_the_pages_words(recipe, tmp_path):
    plan = plan_run(load_page(recipe), root=tmp_path / "runs")
    reads = {stage.stage: stage.reads for stage in plan.stages}
    assert reads["base"] == (f"{tmp_path}/model", f"{tmp_path}/a.txt")
    assert reads["one"] == ("base", f"{tmp_path}/b.txt", f"{tmp_path}/a.txt")
    assert reads["merged"] == ("base", "one", "two", "b")
    assert plan.stages[0].writes == tmp_path / "runs" / "tiny" / "stages" / "base"


def test_a_model_that_cannot_be_had_is_told_with_file_line_and_stage(merges, tmp_path):
    (tmp_path / "two" / "model.safetensors").write_bytes(b"short")
    said = rf"^{tmp_path}/merges.yaml:2: stages.mean: .*/two/model.safetensors: "
    with pytest.raises(PageError, match=said):
        plan_run(merges, root=tmp_path / "runs")
