"""The loop: the same weights whatever happens on the way, files as planned, the user's own models."""

import contextlib
import json
import math
import os
import random
import shutil
import time

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError, InputError
from weightsmith.training import FinetuneConfig, TrainConfig, finetune, plan, train

SMALL = {"batch_size": 2, "sequence_length": 24, "threads": 1}


def weights(folder):
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read_raw(name).tobytes() for name in checkpoint.tensors}


def run_in_child(config, model, out, workdir):
    """What the killed process does (a top-level function: it is sent by name)."""
    (finetune if isinstance(config, FinetuneConfig) else train)(config, model, out, workdir=workdir, seed=5)


CONFIG = TrainConfig(data=["docs", "sort"], steps=12, save_every=2, log_every=1, layer_drop=0.3, **SMALL)


@pytest.fixture(scope="module")
def undisturbed(config_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(CONFIG, config_folder, folder / "model", workdir=folder / "work", seed=5)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(undisturbed, config_folder, tmp_path):
    again = train(CONFIG, config_folder, tmp_path / "again", workdir=tmp_path / "w1", seed=5)
    other = train(CONFIG, config_folder, tmp_path / "other", workdir=tmp_path / "w2", seed=6)
    for file in sorted(os.listdir(undisturbed.checkpoint)):
        assert (again.checkpoint / file).read_bytes() == (undisturbed.checkpoint / file).read_bytes()
    assert weights(other.checkpoint) != weights(undisturbed.checkpoint)


def test_a_model_saved_without_its_prefix_is_trained_and_keeps_its_names(gpt2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(gpt2)
    whole.base_model.save_pretrained(tmp_path / "base")
    whole.config.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "base")
    config = FinetuneConfig(data="docs", steps=2, learning_rate=1e-2, **SMALL)
    finetune(config, tmp_path / "base", tmp_path / "out", workdir=tmp_path / "work")
    finetune(config, gpt2, tmp_path / "whole", workdir=tmp_path / "work of whole")
    before, after, usual = (weights(tmp_path / name) for name in ("base", "out", "whole"))
    assert before["h.0.attn.c_attn.weight"] != after["h.0.attn.c_attn.weight"]
    assert {f"transformer.{name}": raw for name, raw in after.items()} == usual


def killed_and_resumed(forks, config, model, folder, rng, longest):
    """Kill the run at random moments until it gets through; returns how often it was killed."""
    kills = 0
    while True:
        process = forks.Process(target=run_in_child, args=(config, model, folder / "model", folder / "work"))
        process.start()
        process.join(rng.uniform(0.0, longest / 2) if kills < 4 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            return kills


def check_kills(forks, config, model, wanted, tmp_path, kills, seed=0):
    """Run after run, each killed up to four times, until there were `kills` of them."""
    rng = random.Random(seed)
    start = time.perf_counter()
    process = forks.Process(target=run_in_child, args=(config, model, tmp_path / "model", tmp_path / "work"))
    process.start()
    process.join()
    longest = time.perf_counter() - start
    total = number = 0
    while total < kills:
        folder = tmp_path / str(number)
        number += 1
        total += killed_and_resumed(forks, config, model, folder, rng, longest)
        assert weights(folder / "model") == wanted
        assert sorted(p.name for p in folder.iterdir()) == ["model", "work"]
        steps = [
            json.loads(line)["step"] for line in (folder / "work" / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, config.steps + 1))


def test_a_run_killed_at_random_moments_reaches_the_same_weights(undisturbed, config_folder, forks, tmp_path):
    check_kills(forks, CONFIG, config_folder, weights(undisturbed.checkpoint), tmp_path, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills_change_nothing(undisturbed, config_folder, forks, tmp_path):
    check_kills(forks, CONFIG, config_folder, weights(undisturbed.checkpoint), tmp_path, kills=1000, seed=1)


@contextlib.contextmanager
def interrupted_after(monkeypatch, step):
    """Press Ctrl-C at the end of a step."""
    from weightsmith.training.callbacks import Metrics

    usual = Metrics.on_step_end

    def press(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_step_end", press)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_fine_tune_with_dropout_and_accumulation_resumes_to_the_bit(gpt2, forks, tmp_path, monkeypatch):
    """Dropout draws from torch's generator: its state must come back too."""
    config = FinetuneConfig(
        data="docs", steps=7, save_every=3, log_every=1, gradient_accumulation=2, learning_rate=1e-2, **SMALL
    )
    whole = finetune(config, gpt2, tmp_path / "whole", workdir=tmp_path / "w1", seed=1)
    with interrupted_after(monkeypatch, step=5):
        finetune(config, gpt2, tmp_path / "out", workdir=tmp_path / "w2", seed=1)
    resumed = finetune(config, gpt2, tmp_path / "out", workdir=tmp_path / "w2", seed=1)
    assert resumed.resumed_from == 3
    assert weights(resumed.checkpoint) == weights(whole.checkpoint)


def test_a_resumed_run_reports_the_losses_of_an_undisturbed_one(gpt2, tmp_path, monkeypatch):
    """A line's loss is a mean over the steps since the line before, some of them before the kill."""
    config = FinetuneConfig(data="docs", steps=8, save_every=3, log_every=5, **SMALL)
    finetune(config, gpt2, tmp_path / "whole", workdir=tmp_path / "w1")
    with interrupted_after(monkeypatch, step=4):
        finetune(config, gpt2, tmp_path / "out", workdir=tmp_path / "w2")
    finetune(config, gpt2, tmp_path / "out", workdir=tmp_path / "w2")
    whole, resumed = (
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / work / "metrics.jsonl").open()]
        for work in ("w1", "w2")
    )
    assert resumed == whole
    assert [line["step"] for line in whole] == [3, 5, 6, 8]


def test_a_checkpoint_torn_while_it_was_saved_is_never_continued(
    undisturbed, config_folder, tmp_path, monkeypatch
):
    """The process dies after the weights of step 6 are on disk and before the optimiser's state is."""
    from weightsmith.training.trainer import DurableTrainer

    def die(self, output_dir):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return whole(self, output_dir)

    whole = DurableTrainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch:
        patch.setattr(DurableTrainer, "_save_optimizer_and_scheduler", die)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5)
    resumed = train(CONFIG, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5)
    assert resumed.resumed_from == 4
    assert weights(resumed.checkpoint) == weights(undisturbed.checkpoint)


def test_checkpoints_of_another_run_are_not_continued(config_folder, tmp_path, monkeypatch):
    from weightsmith.training import loop

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.training.weights.write_model", full)
        with pytest.raises(OSError, match="No space"):
            loop.train(CONFIG, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5)
    assert any((tmp_path / "work").glob("checkpoint-*"))
    changed = TrainConfig(data="docs", steps=4, **SMALL)
    assert (
        train(changed, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5).resumed_from == 0
    )


def test_a_full_disk_at_the_end_costs_no_step(undisturbed, config_folder, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.training.weights.write_model", full)
        with pytest.raises(OSError, match="No space"):
            train(CONFIG, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5)
    again = train(CONFIG, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=5)
    assert again.resumed_from == CONFIG.steps
    assert weights(again.checkpoint) == weights(undisturbed.checkpoint)
    assert not list((tmp_path / "work").glob("*checkpoint*"))


def test_running_a_finished_run_again_changes_nothing(undisturbed, config_folder):
    """A run may be killed after its result appeared and before anyone was told."""
    before = {file: file.stat().st_mtime_ns for file in undisturbed.checkpoint.iterdir()}
    work = undisturbed.checkpoint.parent / "work"
    again = train(CONFIG, config_folder, undisturbed.checkpoint, workdir=work, seed=5)
    assert {file: file.stat().st_mtime_ns for file in undisturbed.checkpoint.iterdir()} == before
    assert again.resumed_from == again.steps == CONFIG.steps
    assert again.loss == pytest.approx(undisturbed.loss, abs=1e-6)


def test_metrics_tell_steps_tokens_and_falling_loss(undisturbed, config_folder, tmp_path):
    config = TrainConfig(data="names", steps=25, log_every=10, learning_rate=1e-2, **SMALL)
    result = train(
        config, config_folder, tmp_path / "out", workdir=tmp_path / "work", metrics=tmp_path / "m.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert [line["tokens"] for line in lines] == [480, 960, 1200]
    assert result.tokens == 1200
    assert lines[0]["loss"] > lines[-1]["loss"] == pytest.approx(result.loss)
    assert set(lines[0]) == {"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}
    assert lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"]


def test_the_first_loss_is_that_of_a_uniform_guess(undisturbed):
    assert math.log(100) * 0.9 < undisturbed_first_loss(undisturbed) < math.log(100) * 1.1


def undisturbed_first_loss(result):
    lines = (result.checkpoint.parent / "work" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])["loss"]


@pytest.mark.parametrize("kind", ["bed", "folder", "gpt2"])
def test_the_planned_bytes_are_the_bytes_on_disk(kind, config_folder, gpt2, tmp_path):
    make, config, model = {
        "bed": (train, TrainConfig(data="docs", steps=1, **SMALL), "testbed/xs"),
        "folder": (train, TrainConfig(data="docs", steps=1, **SMALL), config_folder),
        "gpt2": (finetune, FinetuneConfig(data="docs", steps=1, **SMALL), gpt2),
    }[kind]
    planned = plan(config, model, seed=0)
    made = make(config, model, tmp_path / "out", workdir=tmp_path / "work", seed=0)
    files = {file.name: file.stat().st_size for file in made.checkpoint.iterdir()}
    assert planned.prediction.disk_bytes == sum(files.values())
    assert set(files) == {*planned.side_files, "model.safetensors", "weightsmith.json"}
    with Checkpoint.open(made.checkpoint) as checkpoint:
        assert {(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values()} == {
            (spec.name, spec.dtype, spec.shape) for spec in planned.specs
        }


def test_a_fine_tune_keeps_the_names_and_dtypes_of_its_start_and_reloads(gpt2, tmp_path):
    from transformers import AutoModelForCausalLM

    file = tmp_path / "mine.txt"
    file.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    config = FinetuneConfig(data=str(file), steps=20, learning_rate=1e-2, warmup_steps=0, **SMALL)
    result = finetune(config, gpt2, tmp_path / "out", workdir=tmp_path / "work")
    with Checkpoint.open(gpt2) as before, Checkpoint.open(result.checkpoint) as after:
        assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in after.tensors.items()
        }
        assert {info.dtype for info in after.tensors.values()} == {"BF16"}
        assert after.lineage.method == "finetune"
        assert after.lineage.inputs[0].fingerprint == before.fingerprint()
    assert (result.checkpoint / "tokenizer.json").read_bytes() == (gpt2 / "tokenizer.json").read_bytes()
    AutoModelForCausalLM.from_pretrained(result.checkpoint)

    from weightsmith.evaluation import evaluate

    learned, untrained = (evaluate(folder, str(file))["mine"].value for folder in (result.checkpoint, gpt2))
    assert learned < 0.8 * untrained


def test_the_written_weights_are_the_trained_ones(config_folder, tmp_path, monkeypatch):
    """Compare with the model that the loop holds in memory when it writes."""
    from weightsmith.training import weights as room

    held = {}
    original = room.write_model

    def spy(model, *args, **options):
        held.update({name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()})
        return original(model, *args, **options)

    monkeypatch.setattr(room, "write_model", spy)
    result = train(
        TrainConfig(data="docs", steps=2, **SMALL), config_folder, tmp_path / "o", workdir=tmp_path / "w"
    )
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert set(checkpoint.tensors) == set(held)
        for name, values in held.items():
            assert np.array_equal(checkpoint.read(name), values.reshape(-1))


def test_replay_without_data_takes_what_the_base_was_trained_on(config_folder, tmp_path):
    base = train(
        TrainConfig(data=["docs", "names"], steps=1, **SMALL),
        config_folder,
        tmp_path / "b",
        workdir=tmp_path / "w",
    )
    planned = plan(FinetuneConfig(data="sort", replay=0.25, **SMALL), base.checkpoint, seed=0)
    assert [entry.source for entry in planned.config.replay_data] == ["docs", "names"]
    assert [entry["source"] for entry in planned.lineage.parameters["replay_data"]] == ["docs", "names"]


def test_replay_of_a_stranger_must_be_told(gpt2):
    with pytest.raises(InputError, match=r"doesn't say what it was trained on.*set replay_data"):
        plan(FinetuneConfig(data="docs", replay=0.25), gpt2, seed=0)


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(config_folder, tmp_path):
    config = TrainConfig(
        data="docs", steps=30, learning_rate=1e18, warmup_steps=0, log_every=1, clip=0.0, **SMALL
    )
    with pytest.raises(
        InputError, match=r"step \d+: the loss is (nan|inf); lower learning_rate \(now 1e\+18\)"
    ):
        train(config, config_folder, tmp_path / "out", workdir=tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_training_and_replaced_on_request(config_folder, tmp_path):
    config = TrainConfig(data="docs", steps=1, **SMALL)
    first = train(config, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=0)
    before = weights(first.checkpoint)
    with pytest.raises(CheckpointError, match="out: exists already; nothing was trained"):
        train(config, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=1)
    assert weights(first.checkpoint) == before
    train(config, config_folder, tmp_path / "out", workdir=tmp_path / "work", seed=1, overwrite=True)
    assert weights(first.checkpoint) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"replay": 1.0}, "replay: expected"),
        ({"learning_rate": -1.0}, "learning_rate: expected above 0"),
        ({"layer_drop": 1.5}, "layer_drop: expected"),
        ({"betas": (0.9, 1.0)}, "betas: expected"),
        ({"data": "sourc"}, "did you mean `source`"),
        ({"replay_data": "nmaes"}, "did you mean `names`"),
    ],
)
def test_wrong_values_are_found_before_anything_is_read(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**{"data": "docs", **changes}).check()


def test_the_learning_rate_follows_the_width(config_folder):
    assert plan(TrainConfig(data="docs"), "testbed/xs", seed=0).config.learning_rate == pytest.approx(2e-3)
    assert plan(TrainConfig(data="docs"), "testbed/s", seed=0).config.learning_rate == pytest.approx(1.5e-3)
    assert plan(TrainConfig(data="docs"), config_folder, seed=0).config.sequence_length == 24


def test_layers_are_dropped_at_random_in_training_and_never_afterwards(config_folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

    from weightsmith.training.callbacks import LayerDrop

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_folder)).eval()
    ids = torch.arange(10)[None]
    whole = model(ids).logits
    drop = LayerDrop(model, 0.5, seed=0)
    kept = []
    for step in range(200):
        drop.on_step_begin(None, TrainerState(global_step=step), None)
        kept.append(
            torch.equal(model(ids).logits, whole)
            if step < 5
            else "forward" not in vars(model.model.layers[1])
        )
        assert "forward" not in vars(model.model.layers[0])
        assert "forward" not in vars(model.model.layers[2])
    assert 0.4 < np.mean(kept) < 0.6
    drop.on_train_end(None, None, None)
    assert torch.equal(model(ids).logits, whole)


def test_layer_drop_of_a_model_without_inner_layers_is_refused(gpt2, tmp_path):
    with pytest.raises(InputError, match="layer_drop: GPT2LMHeadModel has no decoder layers"):
        finetune(
            FinetuneConfig(data="docs", layer_drop=0.1, **SMALL), gpt2, tmp_path / "o", workdir=tmp_path / "w"
        )


def test_a_mixture_of_experts_keeps_its_stored_names_and_resumes_to_the_bit(
    config_folder, tmp_path, monkeypatch
):
    """In memory the experts are one tensor, in the files they are many; the Trainer's own checkpoints mix
    them up."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "moe"
    shutil.copytree(config_folder, folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralConfig(vocab_size=100, max_position_embeddings=96, **shape, **heads)
    MixtralForCausalLM(mixtral).save_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        names = set(checkpoint.tensors)
    assert any("experts.3." in name for name in names)
    config = FinetuneConfig(data="docs", steps=4, save_every=2, learning_rate=1e-2, **SMALL)
    whole = finetune(config, folder, tmp_path / "whole", workdir=tmp_path / "w1")
    with interrupted_after(monkeypatch, step=3):
        finetune(config, folder, tmp_path / "out", workdir=tmp_path / "w2")
    resumed = finetune(config, folder, tmp_path / "out", workdir=tmp_path / "w2")
    assert resumed.resumed_from == 2
    assert set(weights(resumed.checkpoint)) == names
    assert weights(resumed.checkpoint) == weights(whole.checkpoint) != weights(folder)


def test_any_architecture_can_be_trained_from_its_config(tmp_path, config_folder):
    """Tensor names come from the model itself when the bed's shapes don't know it; tied weights are stored
    once."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    folder = tmp_path / "qwen3"
    shutil.copytree(config_folder, folder)
    Qwen3Config(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=96, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    result = train(
        TrainConfig(data="docs", steps=1, **SMALL), folder, tmp_path / "out", workdir=tmp_path / "work"
    )
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
    AutoModelForCausalLM.from_pretrained(result.checkpoint)


def test_half_precision_arithmetic_trains_and_leaves_dtypes_alone(gpt2, config_folder, tmp_path):
    half = {"dtype": "bfloat16", "steps": 3, "learning_rate": 1e-2}
    result = train(
        TrainConfig(data="docs", **half, **SMALL), config_folder, tmp_path / "a", workdir=tmp_path / "w"
    )
    full = train(
        TrainConfig(data="docs", **{**half, "dtype": "float32"}, **SMALL),
        config_folder, tmp_path / "b", workdir=tmp_path / "w",
    )  # fmt: skip
    assert weights(result.checkpoint) != weights(full.checkpoint)
    assert result.loss == pytest.approx(full.loss, rel=0.02)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}


def test_each_function_takes_its_own_config(config_folder, tmp_path):
    with pytest.raises(InputError, match="train takes a TrainConfig"):
        train(FinetuneConfig(data="docs"), config_folder, tmp_path / "o", workdir=tmp_path / "w")
    with pytest.raises(InputError, match="finetune takes a FinetuneConfig"):
        finetune(TrainConfig(data="docs"), config_folder, tmp_path / "o", workdir=tmp_path / "w")


def test_a_tokenizer_too_large_for_the_model_is_one_line(config_folder, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(config_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(CheckpointError, match="the tokenizer has 100 tokens, the model's embedding 99"):
        train(TrainConfig(data="docs", steps=1, **SMALL), folder, tmp_path / "o", workdir=tmp_path / "w")
