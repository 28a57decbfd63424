"""MEAP behind the stages `train` and `finetune`: masked windows, an added token that is gone at the end."""

import pytest
import torch

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.testbed.alphabet import VOCABULARY
from weightsmith.training import (
    AveragingOptions,
    MEAPFinetuneConfig,
    MEAPOptions,
    MEAPTrainConfig,
    StateAverage,
    TrainConfig,
    finetune,
    plan,
    train,
)
from weightsmith.training.meap.durable import MaskedBatches

MASK = VOCABULARY["<mask>"]
SMALL = {"batch_size": 2, "sequence_length": 24, "threads": 1, "steps": 4, "log_every": 1, "warmup_steps": 0}


@pytest.fixture
def read(monkeypatch):
    """Every batch that a model is given, with its labels."""
    from transformers import LlamaForCausalLM

    seen, forward = [], LlamaForCausalLM.forward

    def watching(self, input_ids=None, labels=None, **more):
        seen.append((input_ids.clone(), labels.clone()))
        return forward(self, input_ids=input_ids, labels=labels, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watching)
    return seen


def go(config, model, folder):
    run = finetune if isinstance(config, MEAPFinetuneConfig) else train
    return run(config, model, folder / "model", workdir=folder / "work", seed=3)


def test_windows_are_masked_and_labels_are_those_of_a_plain_run(config_folder, tmp_path, read):
    go(TrainConfig(data="docs", **SMALL), config_folder, tmp_path / "plain")
    plain, read[:] = list(read), []
    go(MEAPTrainConfig(data="docs", **SMALL), config_folder, tmp_path / "meap")
    assert len(read) == len(plain) == 4
    for (ids, labels), (clean, wanted) in zip(read, plain, strict=True):
        hidden = ids == MASK
        assert hidden.sum(1).tolist() == [3, 3]  # 15 % of 23
        assert torch.equal(ids[~hidden], clean[~hidden])
        assert torch.equal(labels, wanted)


def test_padding_is_not_masked_in_place_of_text(config_folder, tmp_path, read):
    short = tmp_path / "short.txt"
    short.write_text("ten tokens")
    config = MEAPTrainConfig(data=str(short), objective=MEAPOptions(mask_ratio=0.3), **SMALL)
    go(config, config_folder, tmp_path)
    for ids, _ in read:
        assert (ids[:, :10] == MASK).sum(1).tolist() == [2, 2]  # 30 % of 9: the end token is special
        assert (ids == MASK).sum() == 4


def test_an_average_measures_losses_on_clean_text(config_folder, tmp_path, read):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 40)
    average = StateAverage(
        options=AveragingOptions(
            method="best", start=0.2, every=1, objective="train", batches=2, num_select=1
        )
    )
    go(MEAPTrainConfig(data=str(text), average=average, **SMALL), config_folder, tmp_path)
    masked = [bool((ids == MASK).any()) for ids, _ in read]
    assert masked[:4] == [True] * 4
    assert len(masked) > 4
    assert not any(masked[4:])


@pytest.mark.parametrize("average", [None, "swa"])
def test_a_tokenizer_without_a_mask_token_gets_one_for_the_time_of_training(gpt2, tmp_path, average):
    config = MEAPFinetuneConfig(
        data="docs",
        objective=MEAPOptions(add_mask_token=True),
        average=StateAverage(options=AveragingOptions(method=average, start=0.2, every=1))
        if average
        else None,
        save_every=2,
        **SMALL,
    )
    go(config, gpt2, tmp_path)
    with Checkpoint.open(gpt2) as before, Checkpoint.open(tmp_path / "model") as after:
        assert {n: i.shape for n, i in before.tensors.items()} == {
            n: i.shape for n, i in after.tensors.items()
        }
        assert before.config["vocab_size"] == after.config["vocab_size"]
        described = after.lineage.parameters["objective"]
    assert described == {"meap": {"add_mask_token": True}}
    assert (gpt2 / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()


def test_what_cant_be_masked_is_told_before_anything_runs(gpt2, config_folder):
    with pytest.raises(InputError, match=r"objective: meap: the tokenizer of .* has no mask token; name a"):
        plan(MEAPFinetuneConfig(data="docs", **SMALL), gpt2, seed=0)
    named = MEAPOptions(mask_token="<|endoftex|>")
    with pytest.raises(InputError, match=r"has no token `<\|endoftex\|>`; did you mean `<\|endoftext\|>`"):
        plan(MEAPFinetuneConfig(data="docs", objective=named, **SMALL), gpt2, seed=0)
    kept = StateAverage(options=AveragingOptions(method="uniform"), keep=True)
    added = MEAPOptions(add_mask_token=True)
    with pytest.raises(InputError, match="kept states"):
        plan(MEAPFinetuneConfig(data="docs", objective=added, average=kept, **SMALL), gpt2, seed=0)
    sft = MEAPTrainConfig(data="docs", objective=MEAPOptions(mode="sft"), **SMALL)
    assert "the data has no prompts" in plan(sft, config_folder, seed=0).warnings[0]


def test_a_run_whose_attention_would_let_copies_see_their_originals_is_refused(
    config_folder, tmp_path, monkeypatch
):
    begin = MaskedBatches.on_train_begin

    def with_flash_attention(self, *args, **kwargs):
        self._network.config._attn_implementation = "flash_attention_2"
        begin(self, *args, **kwargs)

    monkeypatch.setattr(MaskedBatches, "on_train_begin", with_flash_attention)
    config = MEAPTrainConfig(data="docs", objective=MEAPOptions(mode="sft", layout="concat"), **SMALL)
    with pytest.raises(InputError, match=r"layout concat: flash_attention_2 lets copies see .* found 2"):
        go(config, config_folder, tmp_path)


def test_a_plain_config_says_what_it_always_said(config_folder):
    planned = plan(TrainConfig(data="docs", **SMALL), config_folder, seed=0)
    assert "objective" not in planned.lineage.parameters
    masked = plan(MEAPTrainConfig(data="docs", **SMALL), config_folder, seed=0)
    assert masked.lineage.parameters["objective"] == {"meap": {}}
    copies = plan(
        MEAPTrainConfig(data="docs", objective=MEAPOptions(mode="sft"), **SMALL), config_folder, seed=0
    )
    assert copies.prediction.memory_bytes > masked.prediction.memory_bytes
