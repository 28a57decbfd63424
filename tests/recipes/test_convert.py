"""The stage `convert` and the key `architecture`: what a page may say, and a run of both."""

from pathlib import Path

import pytest
import torch

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import PageError
from weightsmith.evaluation import load_model
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe

from .conftest import page_of

ROOT = Path(__file__).parents[2]
PAGE = """\
name: tiny
stages:
  base:
    train: &short
      model: FOLDER/model
      data: FOLDER/a.txt
      sequence_length: 32
      batch_size: 2
      steps: 4
  ztt:
    train:
      <<: *short
      architecture: {ztt: {num_cycles: 3, training_cycles: sample}}
      clip: {adagc: {warmup_steps: 2}}
      decay: {alphadecay: {interval: 3, min_dim: 8}}
      weight_decay: 0.1
      objective: meap
  cycled: {convert: {model: base, to: ztt, num_head_layers: 0}}
  longer: {finetune: {<<: *short, model: cycled}}
  other: {finetune: {<<: *short, model: cycled, seed: 2}}
  merged: {merge: {method: linear, models: [longer, other]}}
  scores: {evaluate: {models: [base, ztt, cycled, longer, merged], tasks: [FOLDER/a.txt]}}
"""


ZTT = "{ztt: {num_cycles: 3, training_cycles: sample}}"


@pytest.fixture
def page(tmp_path):
    return page_of(tmp_path, PAGE, layers=3)


def test_models_with_cycles_are_trained_made_tuned_merged_and_scored(page, tmp_path):
    planned = {stage.stage: stage.prediction for stage in plan_run(page(), root=tmp_path / "runs").stages}
    result = run_recipe(page(), root=tmp_path / "runs", executor=Inline())
    assert {stage.status for stage in result.stages} == {"finished"}
    folders = {name: tmp_path / "runs" / "tiny" / "stages" / name / "checkpoint" for name in planned}
    for name in ("ztt", "cycled", "longer", "merged"):
        with Checkpoint.open(folders[name]) as checkpoint:
            assert checkpoint.config["model_type"] == "ztt"
        size = sum(file.stat().st_size for file in folders[name].rglob("*") if file.is_file())
        assert planned[name].disk_bytes == size
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        base, cycled, longer, ztt = (
            load_model(folders[name], device="cpu")[0](ids) for name in ("base", "cycled", "longer", "ztt")
        )
    assert (cycled.num_cycles_used[0], ztt.num_cycles_used[0]) == (2, 3)
    torch.testing.assert_close(cycled.logits, base.logits, rtol=0.02, atol=0.02)
    assert not torch.allclose(cycled.logits, longer.logits, atol=1e-3)
    with Checkpoint.open(folders["longer"]) as checkpoint:
        assert checkpoint.read("model.cycle_gate.bias")[0] != 0  # training opened it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("to: ztt", "to: rnn"), r"cycled\.to: expected 'ztt', 'htc' or 'bc', found 'rnn'"),
        (("num_head_layers: 0", "cycles: 2"), r"cycled\.cycles: no such key"),
        (
            ("num_head_layers: 0", "num_cycles: 0"),
            r"cycled\.num_cycles: expected a whole number of at least 1, found 0",
        ),
        (("num_head_layers: 0", "exit_kv: none"), r"cycled\.exit_kv: none needs `exit_level: batch`"),
        (
            ("num_cycles: 3,", "zero_token: false, gate: attn,"),
            r"ztt\.architecture\.ztt\.gate: 'attn' has no effect, since `zero_token` is false",
        ),
        (
            ("num_head_layers: 0", "num_cycles: 1, cycle_gate: zero_init"),
            r"cycled\.cycle_gate: 'zero_init' has no effect, since `num_cycles` is 1",
        ),
        (
            ("num_cycles: 3,", "num_cycles: 0,"),
            r"ztt\.architecture\.ztt\.num_cycles: expected a whole number",
        ),
        (("num_cycles: 3,", "exit_threshold: .nan,"), r"ztt\.exit_threshold: expected a finite number .*nan"),
        (
            ("{ztt: {num_cycles: 3, training_cycles: sample}}", "zzt"),
            r"architecture: expected plain, ztt, htc or bc",
        ),
        (("model: cycled}}", "model: cycled, architecture: ztt}}"), r"longer\.architecture: no such key"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_page_that_makes_no_model_says_where(page, change, message):
    with pytest.raises(PageError, match=message):
        load_page(page(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_head_layers: 0", "num_head_layers: 2"), r"stages\.cycled: .*3 of 3 layers leave no middle"),
        (("model: base, to: ztt", "model: ztt, to: ztt"), r"stages\.cycled: model_type: ztt already"),
        (("num_cycles: 3,", "num_head_layers: 3,"), r"stages\.ztt: .*4 of 3 layers leave no middle"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_model_decides_is_told_by_the_plan(page, tmp_path, change, message):
    with pytest.raises(PageError, match=message):
        plan_run(page(change), root=tmp_path / "runs")


def test_the_baselines_are_configurations(page, tmp_path):
    for name in ("htc", "bc"):
        file = page(
            ("{ztt: {num_cycles: 3, training_cycles: sample}}", name),
            ("to: ztt, num_head_layers: 0", f"to: {name}"),
        )
        plan_run(file, root=tmp_path / name)
        stages = load_page(file).stages
        for options in (stages["ztt"].config.architecture, stages["cycled"].config):
            assert not options.zero_token
            assert options.num_head_layers == (0 if name == "bc" else 1)


def test_the_ready_recipe_plans(tmp_path):
    planned = plan_run(ROOT / "recipes" / "ztt.yaml", root=tmp_path)
    times = {stage.stage: stage.prediction.seconds for stage in planned.stages}
    assert times["plain"] < times["htc"] < times["ztt3"]
    assert not list(tmp_path.iterdir())
