"""The keys `clip`, `decay`, `sharpness`, `average`, `objective`: what a page may say, what a run leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from weightsmith.errors import PageError
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe
from weightsmith.recipes.standin import folder_bytes
from weightsmith.training import (
    AdaGCOptions,
    AlphaDecayOptions,
    LightSAMOptions,
    MEAPOptions,
    SAMOptions,
    TeZOOptions,
)

GOOD = """\
stages:
  base:
    train:
      model: testbed/xs
      data: docs
      clip: {adagc: {init: ema, exclude: ['*norm*'], warmup_steps: 30}}
      decay: {alphadecay: {interval: 50, scale_range: [0.5, 2]}}
      sharpness: {asam: {eta: 0.1}}
      average: {sewa: {num_select: 5, steps: 20, start: 0.5, held_out: [names, docs]}}
  off: {train: {model: testbed/xs, data: docs, clip: off, decay: uniform, sharpness: off, average: off}}
  names: {train: {model: testbed/xs, data: docs, clip: adagc, sharpness: lightsam, average: {keep: {}}}}
  norm: {finetune: {model: base, data: docs, clip: {global: 2}, sharpness: {lightsam: {variant: adagrad}}}}
  mean: {average: {states: names, method: {lawa: {num_select: 3}}, last: 6, every: 2}}
  hidden: {train: {model: testbed/xs, data: docs, objective: {meap: {mask_ratio: 0.2}}}}
  clean: {train: {model: testbed/xs, data: docs, objective: ntp}}
  zo: {train: {model: testbed/xs, data: docs, learning_rate: 1, optimizer: {tezo: {variant: adam, rank: 8}}}}
"""


@pytest.fixture
def load(tmp_path):
    def go(text):
        path = tmp_path / "page.yaml"
        path.write_text(text)
        return load_page(path)

    return go


def test_a_page_says_parts_by_name_and_options(load):
    stages = {name: entry.config for name, entry in load(GOOD).stages.items()}
    base = stages["base"]
    assert base.clip == AdaGCOptions(init="ema", exclude=("*norm*",), warmup_steps=30)
    assert base.decay == AlphaDecayOptions(interval=50, scale_range=(0.5, 2.0))
    assert base.sharpness == SAMOptions(adaptive=True, eta=0.1)
    options = base.average.options
    assert (options.method, options.num_select, options.start, options.sewa.steps) == ("sewa", 5, 0.5, 20)
    assert base.average.held_out == ("names", "docs")
    off = stages["off"]
    assert (off.clip, off.decay, off.sharpness, off.average) == (0.0, None, None, None)
    assert (stages["names"].clip, stages["names"].sharpness) == (AdaGCOptions(), LightSAMOptions())
    assert stages["names"].average.keep
    assert (stages["norm"].clip, stages["norm"].sharpness.variant) == (2.0, "adagrad")
    assert stages["zo"].optimizer == TeZOOptions(variant="adam", rank=8)
    assert stages["off"].optimizer is None
    assert stages["mean"].method.options.method == "lawa"
    assert stages["hidden"].objective == MEAPOptions(mask_ratio=0.2)
    assert stages["clean"].objective is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{adagc: {init",
            "{adagcc: {init",
            "6: stages.base.clip.adagcc: expected off, global or adagc, found",
        ),
        ("init: ema", "intit: ema", "6: stages.base.clip.adagc.intit: no such key; did you mean `init`?"),
        ("init: ema", "init: emma", "6: stages.base.clip.adagc.init: expected 'min', 'ema' or 'last'"),
        ("warmup_steps: 30", "beta: 1.5", "6: stages.base.clip.adagc.beta: must be in [0, 1), got 1.5"),
        ("interval: 50", "interval: 0", "7: stages.base.decay.alphadecay.interval: must be at least 1 step"),
        ("interval: 50", "intervl: 9", "alphadecay.intervl: no such key; did you mean `interval`?"),
        ("{eta: 0.1}", "{eta: x}", '8: stages.base.sharpness.asam.eta: expected a number, found "x"'),
        ("asam: {eta", "sam: {eta", "8: stages.base.sharpness.sam.eta: no such key"),
        ("num_select: 5", "num_selct: 5", "9: stages.base.average.sewa.num_selct: no such key; did you mean"),
        ("num_select: 5", "decay: 0.5", "9: stages.base.average.sewa.decay: no such key"),
        ("steps: 20", "steps: 0", "9: stages.base.average.sewa.steps: must be a whole number of at least 1"),
        (
            "held_out: [names",
            "held_out: [nams",
            "9: stages.base.average: held_out `nams`: neither a test-bed",
        ),
        ("held_out: [names, docs]", "held_out: docs, objective: train", "sewa.held_out: has no use with"),
        ("decay: uniform", "decay: {uniform: 3}", "10: stages.off.decay.uniform: takes no options"),
        ("optimizer: {tezo", "optimizr: {tezo", "zo.optimizr: no such key; did you mean `optimizer`?"),
        ("clip: off", "clp: off", "10: stages.off.clp: no such key; did you mean `clip`?"),
        (
            "clip: off",
            "max_grad_norm: 1.0",
            "10: stages.off.max_grad_norm: no such key; write `clip: {global:",
        ),
        ("clip: off", "clip: 3", "10: stages.off.clip: expected off, global or adagc, with options"),
        ("average: {keep: {}}", "average: {keep: {num_select: 2}}", "average.keep.num_select: no such key"),
        ("average: {keep: {}}", "average: swa", "13: stages.mean.states: `names` keeps no states; give it"),
        ("{global: 2}", "{global: x}", '12: stages.norm.clip.global: expected a number, found "x"'),
        ("{global: 2}", "{global: -2}", "12: stages.norm.clip: a global norm must be at least 0"),
        (
            "data: docs, clip: {global: 2}",
            "data: docs, betas: [0.9, 0.99]",
            "12: stages.norm.betas: are AdamW's",
        ),
        (
            "{tezo: {v",
            "{tzo: {v",
            "16: stages.zo.optimizer.tzo: expected adamw, tezo, mezo or lozo, found",
        ),
        ("variant: adam", "variant: adm", "16: stages.zo.optimizer.tezo.variant: expected 'sgd'"),
        ("variant: adam", "varant: adam", "optimizer.tezo.varant: no such key; did you mean `variant`?"),
        ("variant: adam", "rho: 0.0", "16: stages.zo.optimizer.tezo.rho: expected above 0"),
        ("variant: adam", "seed: 3", "16: stages.zo.optimizer.tezo.seed: no such key"),
        ("variant: adam", "eps: 0.1", "tezo.eps: has no effect with variant `sgd`"),
        ("variant: adam", "max_rank: 3", "tezo.max_rank: has no effect without `rank: auto`"),
        ("rank: 8", "rank: 0", "16: stages.zo.optimizer.tezo.rank: expected a whole number"),
        (
            "learning_rate: 1, ",
            "",
            "16: stages.zo.learning_rate: has to be given with `optimizer: tezo`",
        ),
        ("states: names", "states: nmes", "13: stages.mean.states: `nmes` is no stage above"),
        (
            "states: names",
            "models: [base, norm], states: names",
            "13: stages.mean.average: expected `states`,",
        ),
        (
            "mask_ratio: 0.2",
            "mask_ratio: 20",
            "14: stages.hidden.objective.meap.mask_ratio: must be in 0..1, got",
        ),
        (
            "mask_ratio: 0.2",
            "mask_rate: 0.2",
            "objective.meap.mask_rate: no such key; did you mean `mask_ratio`?",
        ),
        ("mask_ratio: 0.2", "mode: sfd", "objective.meap.mode: expected 'pretrain' or 'sft', found 'sfd'"),
        ("objective: ntp", "objective: mep", "15: stages.clean.objective: expected ntp or meap, found 'mep'"),
        ("objective: ntp", "objective: {ntp: {x: 1}}", "15: stages.clean.objective.ntp: takes no options"),
        (
            "mask_ratio: 0.2",
            "mode: sft, copy_loss_weight: 2.0",
            "14: stages.hidden.objective: meap.copy_loss_weight other than 1 needs MEAPTrainerMixin",
        ),
        ("last: 6", "last: 0", "13: stages.mean.last: expected at least 1, got 0"),
        ("{lawa: {num_select: 3}}", "{law: {}}", "13: stages.mean.method.law: expected sewa, uniform, lawa"),
        ("{lawa: {num_select: 3}}", "{lawa: {start: 3}}", "13: stages.mean.method.lawa.start: no such key"),
    ],
)
def test_each_mistake_is_named_with_line_key_and_cure(load, old, new, message):
    assert GOOD.count(old) >= 1
    with pytest.raises(PageError) as caught:
        load(GOOD.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("warmup_steps: 30", "warmup_steps: 31"),
        ("interval: 50", "interval: 51"),
        ("eta: 0.1", "eta: 0.2"),
        ("asam: {eta: 0.1}", "sam: {}"),
        ("steps: 20", "steps: 21"),
        ("held_out: [names, docs]", "held_out: [docs, names]"),
        ("clip: off", "clip: {global: 1.0}"),
        ("rank: 8", "rank: {'*': 8}"),
        ("variant: adagrad", "variant: adagrad_norm"),
        ("num_select: 3", "num_select: 2"),
        ("every: 2", "every: 1"),
        ("mask_ratio: 0.2", "mask_ratio: 0.25"),
        ("objective: ntp", "objective: meap"),
    ],
)
def test_every_option_is_part_of_what_makes_a_stage_the_same(load, old, new):
    def identities(text):
        return {
            name: json.dumps([entry.config.identity(), entry.config.data_fingerprint()])
            for name, entry in load(text).stages.items()
        }

    before, after = identities(GOOD), identities(GOOD.replace(old, new, 1))
    assert sum(before[name] != after[name] for name in before) == 1


RECIPE = """\
name: parts
stages:
  kept:
    train: &short
      model: FOLDER/model
      data: FOLDER/a.txt
      sequence_length: 32
      batch_size: 2
      steps: 8
      save_every: 3
      log_every: 1
      seed: 4
      average: {keep: {start: 0, every: 2}}
  all:
    train:
      <<: *short
      clip: {adagc: {init: ema, warmup_steps: 2}}
      decay: {alphadecay: {interval: 3, min_dim: 8}}
      sharpness: sam
      average: {sewa: {start: 0, every: 2, num_select: 2, steps: 4, held_out: FOLDER/b.txt}}
  probes:
    train: {<<: *short, average: off, learning_rate: 0.01, optimizer: {tezo: {variant: adam, rank: 4}}}
  lawa: {average: {states: kept, method: {lawa: {num_select: 2}}}}
  thin: {average: {states: kept, every: 2}}
  ema: {average: {states: kept, method: {ema: {decay: 0.5}}}}
  greedy: {average: {states: kept, method: {greedy: {held_out: FOLDER/b.txt}}, batch_size: 2}}
  soup:
    average:
      models: [kept, all]
      method: {sewa: {num_select: 1, steps: 4, held_out: FOLDER/b.txt}}
      batch_size: 2
  scores: {evaluate: {models: [kept, all, lawa, ema, greedy, soup], tasks: FOLDER/b.txt}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of all of it, and its plan."""
    from tests.recipes.conftest import small_model

    folder = small_model(tmp_path_factory.mktemp("parts"))
    page = folder / "parts.yaml"
    page.write_text(RECIPE.replace("FOLDER", str(folder)))
    plan = plan_run(page, root=folder / "runs")
    return page, plan, run_recipe(page, root=folder / "runs", plan=plan, executor=Inline())


def read(folder):
    from weightsmith.checkpoints import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name).copy() for name in checkpoint.tensors}


def test_a_run_leaves_states_choices_and_history_and_nothing_else(made):
    stages = made[2].folder / "stages"
    assert {file.name for file in (stages / "kept").iterdir()} == {
        "checkpoint",
        "metrics.jsonl",
        "stage.json",
        "states",
    }
    assert {file.name for file in (stages / "kept" / "states").iterdir()} == {
        f"step-{n}" for n in (2, 4, 6, 8)
    }
    assert {file.name for file in (stages / "all").iterdir()} == {
        "alphadecay.jsonl",
        "checkpoint",
        "metrics.jsonl",
        "selection.json",
        "stage.json",
    }
    record = json.loads((stages / "all" / "stage.json").read_text())
    assert record["config"]["clip"] == {"adagc": {"init": "ema", "warmup_steps": 2}}
    assert record["config"]["sharpness"] == {"sam": {}}


def test_stages_with_one_seed_begin_with_the_same_weights_and_data(made):
    """Both logged the loss of step 1 before any part could change a weight."""
    losses = []
    for stage in ("kept", "all"):
        file = made[2].folder / "stages" / stage / "metrics.jsonl"
        losses.append(json.loads(file.read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1]


def test_averages_of_states_are_what_their_rules_say(made):
    import numpy as np

    stages = made[2].folder / "stages"
    states = {n: read(stages / "kept" / "states" / f"step-{n}") for n in (2, 4, 6, 8)}
    wanted = {
        "lawa": {6: 0.5, 8: 0.5},
        "thin": {4: 0.5, 8: 0.5},
        "ema": {2: 0.125, 4: 0.125, 6: 0.25, 8: 0.5},
    }
    for name, weights in wanted.items():
        for tensor, values in read(stages / name / "checkpoint").items():
            mean = sum(weight * states[step][tensor].astype(np.float64) for step, weight in weights.items())
            np.testing.assert_allclose(values, mean, rtol=1e-6, atol=1e-7, err_msg=f"{name} {tensor}")


def test_an_average_of_states_is_a_whole_model(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages = made[2].folder / "stages"
    for name in ("lawa", "greedy", "all"):
        AutoModelForCausalLM.from_pretrained(stages / name / "checkpoint")
        AutoTokenizer.from_pretrained(stages / name / "checkpoint")
    scores = json.loads((stages / "scores" / "scores.json").read_text())["models"]
    assert scores["lawa"] != scores["kept"]


def test_the_disk_that_was_planned_is_what_a_rule_takes(made):
    stages = {stage.stage: stage.prediction.disk_bytes for stage in made[1].stages}
    folder = made[2].folder / "stages"
    for name in ("lawa", "thin", "ema"):
        assert folder_bytes(folder / name / "checkpoint") == stages[name]
    assert (
        folder_bytes(folder / "kept" / "checkpoint") + folder_bytes(folder / "kept" / "states")
        == stages["kept"]
    )
    assert folder_bytes(folder / "all" / "checkpoint") == stages["all"]


def test_a_second_run_reuses_everything_and_a_damaged_state_is_made_again(made):
    page, _, result = made
    statuses = [stage.status for stage in plan_run(page, root=result.folder.parent).stages]
    assert set(statuses) == {"reuse"}
    state = next((result.folder / "stages" / "kept" / "states" / "step-4").glob("*.safetensors"))
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = {stage.stage: stage.status for stage in plan_run(page, root=result.folder.parent).stages}
    assert (again["kept"], again["all"]) == ("run", "reuse")
    state.write_bytes(content)


def test_the_report_shows_what_the_parts_did(made):
    from weightsmith.reports import write_report

    html = write_report(made[2].folder).read_text()
    for words in (
        "One training, 3 ways",
        "Clipping",
        "Sharpness",
        "Weight decay by matrix",
        "States averaged",
    ):
        assert words in html
    assert "sewa: 2 of 4 states" in html


def test_a_method_that_measures_needs_data_before_anything_starts(made, tmp_path):
    page = tmp_path / "page.yaml"
    page.write_text(re.sub(r"greedy: {held_out: [^}]*}", "greedy: {batches: 3}", made[0].read_text()))
    with pytest.raises(PageError, match=r"stages\.greedy: method\.greedy: measures losses; name `held_out`"):
        plan_run(page, root=made[2].folder.parent)


def test_the_ready_recipe_of_parts_runs(tmp_path):
    """A few steps of it; its own takes minutes."""
    text = (Path(__file__).parents[2] / "recipes" / "training_parts.yaml").read_text()
    for old, new in (
        ("steps: 200", "steps: 6\n      sequence_length: 24"),
        ("batch_size: 16", "batch_size: 2"),
        ("every: 10", "every: 1"),
        ("num_select: 5", "num_select: 2"),
        ("steps: 60", "steps: 2"),
        ("warmup_steps: 20", "warmup_steps: 3"),
        ("interval: 20", "interval: 3"),
        ("tasks: all", "tasks: all\n      characters: 2000"),
    ):
        assert old in text
        text = text.replace(old, new)
    page = tmp_path / "training_parts.yaml"
    page.write_text(text)
    result = run_recipe(page, root=tmp_path / "runs", executor=Inline())
    assert {stage.status for stage in result.stages} == {"finished"}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("meap", ("plain", "masked", "harder", "scores")),
        ("tezo", ("tezo_adam", "mezo", "lozo", "adamw", "scores")),
    ],
)
def test_a_ready_recipe_can_be_planned(name, stages, tmp_path, capsys, monkeypatch):
    """Its run takes minutes."""
    from weightsmith.cli.main import app

    page = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    assert not app(["run", str(page), "--dry-run"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in stages)
    assert not list(tmp_path.rglob("*.safetensors"))
