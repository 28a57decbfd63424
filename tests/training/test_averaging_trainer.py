"""Averaging as a callback of the Hugging Face Trainer."""

import json
import logging
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.training import AveragingCallback, SeWAOptions

STEPS = 12


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )


def examples(number=40, seed=1):
    ids = torch.randint(0, 32, (number, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


class States(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.after[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer(folder, *callbacks, model=None, **arguments):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = TrainingArguments(**{**defaults, **arguments})
    return Trainer(
        model=model or llama(), args=arguments, train_dataset=examples(), callbacks=list(callbacks)
    )


def held_out():
    ids = torch.stack([example["input_ids"] for example in examples(8, seed=2)])
    return [{"input_ids": ids, "labels": ids}]


def averaging(method, **options):
    defaults = {"num_select": 2, "num_candidates": 4, "start": 0.3}
    if method in ("sewa", "best", "greedy"):
        defaults["held_out"] = held_out()
    if method == "sewa":
        defaults["sewa"] = SeWAOptions(steps=15)
    return AveragingCallback(method=method, **{**defaults, **options})


def saved(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def parameters(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_the_mean_of_the_latest_states_is_written_and_the_model_keeps_its_own(tmp_path):
    states, callback = States(), averaging("lawa", num_select=3)
    run = trainer(tmp_path, states, callback)
    run.train()
    assert callback.selection.chosen_steps == (8, 10, 12)
    mean = saved(tmp_path / "averaged")
    for name, value in parameters(run).items():
        expected = sum(states.after[step][name].double() for step in (8, 10, 12)) / 3
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(value, states.after[STEPS][name])
    assert not (tmp_path / "averaging").exists()


def test_the_mean_can_be_left_in_the_model_without_a_folder(tmp_path):
    states, callback = States(), averaging("uniform", load=True, write=False)
    run = trainer(tmp_path, states, callback)
    run.train()
    assert not (tmp_path / "averaged").exists()
    for name, value in parameters(run).items():
        expected = sum(states.after[step][name].double() for step in (6, 8, 10, 12)) / 4
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["swa", "ema"])
def test_running_means_follow_every_state_of_the_tail(tmp_path, method):
    states, callback = States(), averaging(method, every=1, decay=0.6, load=True)
    run = trainer(tmp_path, states, callback)
    run.train()
    tail = [states.after[step] for step in range(4, STEPS + 1)]
    for name, value in parameters(run).items():
        mean = tail[0][name].double()
        for number, state in enumerate(tail[1:], start=2):
            pull = 0.4 if method == "ema" else 1 / number
            mean = mean + pull * (state[name].double() - mean)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sewa", "lawa", "ema"])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, method):
    whole = trainer(tmp_path / "whole", averaging(method, every=1))
    whole.train()
    trainer(
        tmp_path / "again",
        averaging(method, every=1, keep_candidates=True),
        save_strategy="steps",
        save_steps=7,
    ).train()  # what it collected after step 7 is collected again
    again = trainer(tmp_path / "again", averaging(method, every=1))
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-7"))
    theirs = saved(tmp_path / "whole" / "averaged")
    for name, value in saved(tmp_path / "again" / "averaged").items():
        assert torch.equal(value, theirs[name]), name


def test_sewa_leaves_out_a_state_that_was_ruined(tmp_path):
    class Ruin(TrainerCallback):
        """Noise on the weights for one step, as a spike would leave them."""

        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == 9:
                self.kept = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}
                with torch.no_grad():
                    for p in kwargs["model"].parameters():
                        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 9:
                with torch.no_grad():
                    for name, p in kwargs["model"].named_parameters():
                        p.copy_(self.kept[name])

    callback = averaging("sewa", every=1, num_candidates=6, sewa=SeWAOptions(steps=60))
    trainer(tmp_path, Ruin(), callback).train()
    assert 9 in callback.selection.steps
    assert 9 not in callback.selection.chosen_steps
    record = json.loads((tmp_path / "averaged" / "weightsmith" / "selection.json").read_text())
    assert record["chosen_steps"] == list(callback.selection.chosen_steps)
    with Checkpoint.open(tmp_path / "averaged") as checkpoint:
        assert checkpoint.lineage.method == "average"
        assert [a.name for a in checkpoint.lineage.inputs] == [f"step-{s}" for s in record["chosen_steps"]]


def test_states_that_are_not_finite_are_left_out(tmp_path, caplog):
    class Ruin(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == STEPS:
                with torch.no_grad():
                    next(kwargs["model"].parameters())[0, 0] = math.nan

    callback = averaging("uniform")
    trainer(tmp_path, Ruin(), callback).train()
    assert callback.selection.chosen_steps == (6, 8, 10)
    assert "NaN or infinity: steps [12]" in caplog.text


def test_a_run_that_ends_before_the_tail_warns_and_leaves_the_model(tmp_path, caplog):
    callback = averaging("lawa", start=50)
    trainer(tmp_path, callback).train()
    assert callback.selection is None
    assert "no state was averaged" in caplog.text
    assert not (tmp_path / "averaged").exists()


def test_fewer_candidates_than_asked_for_are_all_averaged(tmp_path, caplog):
    callback = averaging("sewa", num_select=4, num_candidates=8, start=9, every=2)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, callback).train()
    assert callback.selection.chosen_steps == (10, 12)
    assert "only 2 candidates for num_select 4" in caplog.text


def test_a_running_mean_that_is_gone_stops_the_run_that_would_need_it(tmp_path):
    first = trainer(tmp_path, averaging("ema", keep_candidates=True), save_strategy="steps", save_steps=8)
    first.train()
    (tmp_path / "averaging" / "running-8" / "count.json").unlink()
    again = trainer(tmp_path, averaging("ema"))
    with pytest.raises(InputError, match="the running mean of step 8 is not there"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_training_data_is_the_criterion_when_nothing_is_held_out(tmp_path):
    callback = averaging("best", held_out=None)
    trainer(tmp_path, callback).train()
    assert len(callback.selection.scores) == 4


def test_frozen_weights_are_not_kept_with_candidates(tmp_path):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    callback = averaging("lawa", keep_candidates=True)
    trainer(tmp_path, callback, model=model).train()
    with Checkpoint.open(tmp_path / "averaging" / "step-12") as checkpoint:
        assert "model.embed_tokens.weight" not in checkpoint.tensors
    assert "model.embed_tokens.weight" in saved(tmp_path / "averaged")


def test_adapters_are_averaged_with_a_warning_and_written_as_adapters(tmp_path, caplog):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    states, callback = States(), averaging("lawa")
    trainer(tmp_path, states, callback, model=model).train()
    assert "not averaging their products" in caplog.text
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "averaged")
    name = next(n for n in states.after[STEPS] if "lora_B" in n)
    expected = (states.after[10][name] + states.after[12][name]) / 2
    torch.testing.assert_close(dict(loaded.named_parameters())[name], expected, rtol=1e-5, atol=1e-7)


def test_held_out_data_is_asked_for_by_name():
    with pytest.raises(InputError, match="objective `val` needs `held_out`"):
        AveragingCallback(method="sewa", objective="val")
