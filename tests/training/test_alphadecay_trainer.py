"""AlphaDecay as a callback of the Hugging Face Trainer."""

import shutil

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_lines
from weightsmith.training import AlphaDecay, AlphaDecayCallback

STEPS = 9


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def examples(number=40):
    ids = torch.randint(0, 32, (number, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, callback, **arguments):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = TrainingArguments(**{**defaults, **arguments})
    callbacks = [callback] if callback is not None else []
    return Trainer(model=llama(), args=arguments, train_dataset=examples(), callbacks=callbacks)


def callback(**options):
    return AlphaDecayCallback(min_dim=8, interval=4, **options)


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_equal(ours, theirs):
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_the_trainer_takes_the_steps_of_a_plain_loop_with_the_same_optimiser(tmp_path):
    run = trainer(tmp_path, callback(), optim="adamw_torch", max_grad_norm=0.0)
    run.train()

    model = llama().train()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    decay = AlphaDecay(model, optimizer, min_dim=8, interval=4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    for _, batch in zip(range(STEPS), trainer(tmp_path, None).get_train_dataloader(), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    taken = read_lines(tmp_path / "alphadecay.jsonl")[-1]["weight_decay"]
    assert len(taken) == 14
    assert list(taken.values()) == pytest.approx(list(decay.weight_decays().values()), rel=1e-3)
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_that_goes_on_from_a_checkpoint_equals_an_undisturbed_one_bit_for_bit(tmp_path, restore):
    whole = trainer(tmp_path / "whole", callback())
    whole.train()
    stopped = trainer(tmp_path / "again", callback(), save_strategy="steps", save_steps=6)
    stopped.train()  # its lines after step 6 are written again
    options = {"restore_callback_states_from_checkpoint": restore}
    again = trainer(tmp_path / "again", callback(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-6"))
    assert_equal(weights(again), weights(whole))
    log = read_lines(tmp_path / "again" / "alphadecay.jsonl")
    assert log == read_lines(tmp_path / "whole" / "alphadecay.jsonl")
    assert [record["step"] for record in log] == [0, 4, 8]


def test_a_checkpoint_made_without_it_can_be_continued_with_it(tmp_path):
    trainer(tmp_path, None, save_strategy="steps", save_steps=6).train()
    again = trainer(tmp_path, callback(), save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [record["step"] for record in read_lines(tmp_path / "alphadecay.jsonl")] == [6, 8]
    assert (tmp_path / "checkpoint-9").is_dir()


def test_equal_ends_of_the_range_train_as_the_trainer_alone(tmp_path):
    ours = trainer(tmp_path / "ours", callback(scale_range=(1.0, 1.0)), optim="adamw_torch")
    plain = trainer(tmp_path / "plain", None, optim="adamw_torch")
    ours.train()
    plain.train()
    assert_equal(weights(ours), weights(plain))


def test_training_twice_starts_anew_and_leaves_the_optimiser_free(tmp_path):
    run = trainer(tmp_path, callback())
    run.train()
    shutil.rmtree(tmp_path)
    run.train()
    assert [record["step"] for record in read_lines(tmp_path / "alphadecay.jsonl")] == [0, 4, 8]


def test_accumulated_gradients_count_as_one_step(tmp_path):
    trainer(tmp_path, callback(), gradient_accumulation_steps=2).train()
    assert [record["step"] for record in read_lines(tmp_path / "alphadecay.jsonl")] == [0, 4, 8]


def test_an_optimiser_that_does_not_decouple_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match="make AlphaDecay before the scheduler"):
        trainer(tmp_path, callback(), optim="sgd").train()


def test_an_unknown_option_is_named():
    with pytest.raises(InputError, match="no such option of AlphaDecay: intervall"):
        AlphaDecayCallback(intervall=3)
