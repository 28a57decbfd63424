"""Parts in the loop: switched on by a key, counted in the plan, and as resumable as a run without them."""

import dataclasses
import json

import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.training import (
    AdaGCOptions,
    AlphaDecayOptions,
    AveragingOptions,
    LightSAMOptions,
    LOZOOptions,
    MEAPOptions,
    MEAPTrainConfig,
    MeZOOptions,
    SAMOptions,
    SeWAOptions,
    StateAverage,
    TeZOOptions,
    TrainConfig,
    plan,
    train,
)

SMALL = {"batch_size": 2, "sequence_length": 24, "threads": 1, "steps": 12, "log_every": 2}
DECAY = AlphaDecayOptions(interval=5, min_dim=8)
ADAGC = AdaGCOptions(init="ema", warmup_steps=3)


def averaged(method, **options):
    return StateAverage(options=AveragingOptions(method=method, start=0.2, **options))


RUNS = {
    "adagc": {"clip": ADAGC},
    "alphadecay": {"decay": DECAY},
    "alphadecay in groups": {"decay": AlphaDecayOptions(interval=5, min_dim=8, mode="groups")},
    "sam": {"sharpness": SAMOptions()},
    "asam, accumulated": {"sharpness": SAMOptions(adaptive=True), "gradient_accumulation": 2},
    "lightsam I": {"sharpness": LightSAMOptions(variant="adagrad_norm"), "clip": 0.0},
    "lightsam II": {"sharpness": LightSAMOptions(variant="adagrad"), "clip": 0.0},
    "lightsam III": {"sharpness": LightSAMOptions()},
    "ema": {"average": averaged("ema", every=1, decay=0.7)},
    "lawa": {"average": averaged("lawa", every=1, num_select=2, num_candidates=3)},
    "sewa": {"average": averaged("sewa", every=1, num_select=3, sewa=SeWAOptions(steps=6))},
    "kept": {
        "average": StateAverage(
            keep=True, options=AveragingOptions(method="uniform", start=0.2, every=2, num_candidates=3)
        )
    },
    "meap": {"objective": MEAPOptions(), "gradient_accumulation": 2, "sharpness": SAMOptions()},
    "meap on answers": {"objective": MEAPOptions(mode="sft", min_answer_tokens=5)},
    "all, lightsam": {
        "clip": ADAGC,
        "decay": DECAY,
        "sharpness": LightSAMOptions(),
        "average": averaged("swa", every=1),
        "layer_drop": 0.3,
    },
    "tezo": {"optimizer": TeZOOptions(rank=4), "learning_rate": 1e-3},
    "tezo adam, accumulated": {
        "optimizer": TeZOOptions(variant="adam", rank="auto", refresh_interval=5, restore="branch"),
        "learning_rate": 1e-3,
        "gradient_accumulation": 2,
    },
    "mezo adam": {"optimizer": MeZOOptions(variant="adam"), "learning_rate": 1e-3},
    "lozo momentum": {"optimizer": LOZOOptions(variant="momentum", interval=3), "learning_rate": 1e-3},
    "all, tezo": {
        "optimizer": TeZOOptions(variant="momentum", rank=4, restore="snapshot"),
        "learning_rate": 1e-3,
        "decay": DECAY,
        "average": averaged("swa", every=1),
        "layer_drop": 0.3,
    },
    "all, sam": {
        "clip": ADAGC,
        "decay": DECAY,
        "sharpness": SAMOptions(),
        "average": averaged("greedy", every=2),
    },
}


def config(name, **more):
    kind = MEAPTrainConfig if "objective" in RUNS[name] else TrainConfig
    return kind(data="docs", save_every=4, **{**SMALL, **RUNS[name], **more})


def files(folder):
    """Everything a run leaves, seconds and paths aside."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in (".lock", "run.json") and "start" not in file.parts:
            content = file.read_bytes()
            if file.name == "metrics.jsonl":
                lines = [json.loads(line) | {"seconds": 0} for line in content.splitlines()]
                content = json.dumps(lines).encode()
            found[file.relative_to(folder).as_posix()] = content
    return found


def go(name, model, folder, **more):
    return train(
        config(name, **more),
        model,
        folder / "model",
        workdir=folder / "work",
        seed=3,
        metrics=folder / "metrics.jsonl",
        states=folder / "states",
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_in_a_step_or_before_its_result_ends_as_an_undisturbed_one(
    name, config_folder, tmp_path, monkeypatch
):
    from weightsmith.training.callbacks import Metrics

    go(name, config_folder, tmp_path / "whole")

    def press(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == 7:
            raise KeyboardInterrupt

    def full(*args, **options):
        if args[1].name == "model":
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    from weightsmith.training import weights

    usual, write = Metrics.on_step_end, weights.write_model
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_step_end", press)
        with pytest.raises(KeyboardInterrupt):
            go(name, config_folder, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_model", full)
        with pytest.raises(OSError, match="No space"):
            go(name, config_folder, tmp_path / "stopped")
    assert go(name, config_folder, tmp_path / "stopped").resumed_from == 12
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_running_mean_is_there_when_its_checkpoint_is(config_folder, tmp_path, monkeypatch):
    """The process dies between the checkpoint's rename and what callbacks do after it."""
    from weightsmith.training.trainer import DurableTrainer

    def save(self, model, trial):
        usual(self, model, trial)
        raise KeyboardInterrupt

    go("ema", config_folder, tmp_path / "whole")
    usual = DurableTrainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(DurableTrainer, "_save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            go("ema", config_folder, tmp_path / "stopped")
    assert go("ema", config_folder, tmp_path / "stopped").resumed_from == 4
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adagc", "alphadecay", "sam", "lightsam III", "ema", "lawa", "tezo"])
def test_each_key_changes_the_result_and_the_fingerprint(name, config_folder, tmp_path):
    plain = TrainConfig(data="docs", save_every=4, **SMALL)
    rate = RUNS[name].get("learning_rate") or plan(plain, config_folder, seed=3).config.learning_rate
    plain = dataclasses.replace(plain, learning_rate=rate)
    parted = config(name, learning_rate=rate)
    train(plain, config_folder, tmp_path / "plain", workdir=tmp_path / "w", seed=3)
    go(name, config_folder, tmp_path)
    with Checkpoint.open(tmp_path / "plain") as one, Checkpoint.open(tmp_path / "model") as other:
        assert one.fingerprint(full=True) != other.fingerprint(full=True)
        assert one.lineage.parameters != other.lineage.parameters
    assert plan(plain, config_folder, seed=3).fingerprint != plan(parted, config_folder, seed=3).fingerprint


def test_alphadecay_in_groups_decays_as_the_decoupled_one(config_folder, tmp_path):
    for name in ("alphadecay", "alphadecay in groups"):
        go(name, config_folder, tmp_path / name)
    history = [
        (tmp_path / name / "alphadecay.jsonl").read_text() for name in RUNS if name.startswith("alpha")
    ]
    first, second = ([json.loads(line) for line in text.splitlines()] for text in history)
    assert [record["step"] for record in first] == [0, 5, 10]
    assert first[0] == second[0]
    for one, other in zip(first, second, strict=True):
        assert one["weight_decay"] == pytest.approx(other["weight_decay"], rel=1e-4)


def test_metrics_tell_what_the_parts_did(config_folder, tmp_path):
    go("all, sam", config_folder, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all({"clipped", "smallest_factor", "nonfinite", "sharpness"} <= set(line) for line in lines)
    assert all(0 <= line["clipped"] <= 1 for line in lines)
    assert all(line["sharpness"] > 0 for line in lines)


def test_sharpness_is_the_rise_of_the_loss_however_the_batch_is_cut(config_folder, tmp_path):
    rises = []
    for parts, batch in ((1, 4), (2, 2)):
        more = {"gradient_accumulation": parts, "batch_size": batch, "steps": 1, "log_every": 1}
        go("sam", config_folder, tmp_path / str(parts), **more)
        rises.append(json.loads((tmp_path / str(parts) / "metrics.jsonl").read_text())["sharpness"])
    assert rises[0] == pytest.approx(rises[1], rel=1e-3)


def test_without_gradients_a_plan_needs_less_memory_and_two_thirds_of_the_time():
    long = {"data": "docs", "steps": 3000, "learning_rate": 1e-3}
    cost = {
        name: plan(TrainConfig(**long, optimizer=options), "testbed/s", seed=0).prediction
        for name, options in {
            "adamw": None,
            "tezo": TeZOOptions(variant="adam", rank=8),
            "mezo": MeZOOptions(),
            "mezo adam": MeZOOptions(variant="adam"),
            "lozo": LOZOOptions(),
        }.items()
    }
    assert 0.6 < cost["tezo"].seconds / cost["adamw"].seconds < 0.8 < cost["mezo"].seconds
    assert cost["mezo"].seconds > cost["tezo"].seconds
    memory = {name: found.memory_bytes for name, found in cost.items()}
    assert memory["mezo"] < memory["lozo"] < memory["tezo"] < memory["mezo adam"] < memory["adamw"]


def test_the_value_of_optimizer_goes_with_a_config_but_not_into_its_fields():
    """Keys of finished test-beds are made of the fields."""
    given = TrainConfig(data="docs", optimizer=TeZOOptions(rank=4))
    assert dataclasses.replace(given, steps=3).optimizer == TeZOOptions(rank=4)
    assert "optimizer" not in dataclasses.asdict(given)


def test_a_kept_state_is_a_whole_model_of_its_step(config_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    go("kept", config_folder, tmp_path)
    states = sorted((tmp_path / "states").iterdir(), key=lambda path: int(path.name[5:]))
    assert [state.name for state in states] == ["step-8", "step-10", "step-12"]
    AutoModelForCausalLM.from_pretrained(states[0])
    AutoTokenizer.from_pretrained(states[0])
    with Checkpoint.open(states[-1]) as last, Checkpoint.open(tmp_path / "model") as model:
        assert last.fingerprint(full=True) == model.fingerprint(full=True)
        assert last.lineage.parameters["state_of_step"] == 12


@pytest.mark.parametrize("name", ["kept", "ema", "all, sam", "adagc"])
def test_the_planned_bytes_are_the_bytes_on_disk(name, config_folder, tmp_path):
    go(name, config_folder, tmp_path)
    made = [*(tmp_path / "model").rglob("*"), *(tmp_path / "states").rglob("*")]
    planned = plan(config(name), config_folder, seed=3).prediction
    assert planned.disk_bytes == sum(file.stat().st_size for file in made if file.is_file())


def test_a_plan_counts_second_passes_and_states():
    long = {"data": "docs", "steps": 3000}
    base = plan(TrainConfig(**long), "testbed/xs", seed=0).prediction
    twice = plan(TrainConfig(**long, sharpness=SAMOptions()), "testbed/xs", seed=0).prediction
    assert 1.9 < (twice.seconds - 4) / (base.seconds - 4) < 2.1
    assert twice.memory_bytes > base.memory_bytes
    kept = StateAverage(options=AveragingOptions(method="lawa", num_candidates=50), keep=True)
    assert plan(TrainConfig(**long, average=kept), "testbed/xs", seed=0).prediction.disk_bytes > 50 * (
        base.disk_bytes - 100_000
    )
    lawa = StateAverage(options=AveragingOptions(method="lawa", num_candidates=50))
    more = plan(TrainConfig(**long, average=lawa), "testbed/xs", seed=0).prediction
    assert more.disk_bytes < 1.1 * base.disk_bytes
    assert more.scratch_bytes - base.scratch_bytes > 40 * base.disk_bytes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optimizer": TeZOOptions()},
            "learning_rate: has to be given with `optimizer: tezo`; about 1e-3 to 1e-4 for a million",
        ),
        (
            {"optimizer": TeZOOptions(), "learning_rate": 1e-3, "betas": (0.9, 0.99)},
            r"betas: are AdamW's; tezo takes its own \(`optimizer: {tezo: {betas",
        ),
        (
            {"optimizer": MeZOOptions(), "learning_rate": 1e-3, "sharpness": SAMOptions()},
            "sharpness: needs gradients, and `optimizer: mezo` has none",
        ),
        (
            {"optimizer": MeZOOptions(), "learning_rate": 1e-3, "clip": 2.0},
            "clip: there are no gradients to clip with `optimizer: mezo`",
        ),
        (
            {"optimizer": LOZOOptions(), "learning_rate": 1e-3, "clip": ADAGC},
            "clip: there are no gradients to clip with `optimizer: lozo`",
        ),
        ({"clip": -1.0}, "clip: a global norm must be at least 0"),
        ({"decay": AlphaDecayOptions(), "weight_decay": 0.0}, "decay: alphadecay shares out `weight_decay`"),
        (
            {"decay": AlphaDecayOptions(mode="decoupled"), "sharpness": SAMOptions()},
            "decay: mode `decoupled` multiplies weights that a two-pass step then restores",
        ),
        (
            {"sharpness": LightSAMOptions(), "betas": (0.9, 0.99)},
            "betas: are AdamW's; LightSAM takes its own",
        ),
        (
            {"average": averaged("lawa", every=4)},
            "average: num_select is 10, but the run takes only 3 states",
        ),
        (
            {"average": StateAverage(options=AveragingOptions(method="swa", start=40))},
            "average: nothing is taken: `start` is 40, the run has 12 steps",
        ),
        (
            {"clip": AdaGCOptions(exclude=("*norn*",))},
            r"clip: adagc.exclude: `\*norn\*` matches no parameter",
        ),
        ({"decay": AlphaDecayOptions(min_dim=500)}, "decay: alphadecay finds no matrix"),
        ({"decay": AlphaDecayOptions(include=("q_porj",))}, "decay: alphadecay finds no matrix"),
        ({"decay": AlphaDecayOptions(exclude=("(",))}, r"decay: '\(' is no regular expression"),
        (
            {"data": __file__, "average": averaged("best", num_select=2, objective="val")},
            "average: objective `val` needs `held_out`",
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(keys, message):
    with pytest.raises(InputError, match=message):
        plan(TrainConfig(**{"data": "docs", **SMALL, **keys}), "testbed/xs", seed=0)


def test_what_is_hardly_meant_is_a_warning_of_the_plan():
    strange = {
        "clip": AdaGCOptions(warmup_steps=12),
        "decay": AlphaDecayOptions(),
        "average": averaged("best", num_select=2),
    }
    told = plan(TrainConfig(data=__file__, **SMALL, **strange), "testbed/xs", seed=0).warnings
    assert [line.partition(":")[0] for line in told] == ["clip", "decay", "average"]
    assert plan(TrainConfig(data="docs", **SMALL), "testbed/xs", seed=0).warnings == ()
    rounded = {"optimizer": TeZOOptions(), "learning_rate": 1e-3, "dtype": "bfloat16"}
    told = plan(TrainConfig(data="docs", **SMALL, **rounded), "testbed/xs", seed=0).warnings
    assert [line.partition(":")[0] for line in told] == ["dtype"]


def test_losses_of_averages_are_measured_on_the_calibration_pools(config_folder, tmp_path, monkeypatch):
    from weightsmith.training import data

    splits = []
    usual = data.domains.documents
    monkeypatch.setattr(
        data.domains, "documents", lambda name, split: splits.append((name, split)) or usual(name, split)
    )
    go("sewa", config_folder, tmp_path)
    assert splits == [("docs", "train"), ("docs", "calibration")]
    chosen = json.loads((tmp_path / "selection.json").read_text())
    assert chosen["method"] == "sewa"
    assert len(chosen["chosen_steps"]) == 3
