"""MEAP in the Trainer: clean evaluation, masks that a resumed run draws again, means that count copies."""

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from weightsmith.errors import InputError
from weightsmith.testbed import write_model_folder
from weightsmith.testbed.alphabet import EOS, VOCABULARY
from weightsmith.training import DataCollatorForMEAP, MEAPCallback, MEAPTrainer, ZTTConfig, ZTTForCausalLM

MASK = VOCABULARY["<mask>"]
SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(write_model_folder("xs", tmp_path_factory.mktemp("bed")))


class Watching(LlamaForCausalLM):
    """Remembers what it reads."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        if not hasattr(self, "read"):
            self.read = {True: [], False: []}
        self.read[self.training].append(input_ids.clone())
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)


Watching.__name__ = "LlamaForCausalLM"  # by the name a Trainer knows that the model shifts labels


def model(vocabulary=100):
    torch.manual_seed(0)
    return Watching(LlamaConfig(**{**SIZES, "vocab_size": vocabulary}))


def texts(count=12, length=24):
    noise = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 90, (length,), generator=noise).tolist()} for _ in range(count)]


def arguments(folder, **changes):
    fields = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**fields, **changes})


def run(
    folder, cls=MEAPTrainer, collator=None, callbacks=(), resume=None, data=None, held_out=None, **changes
):
    collator = collator or DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, seed=5)
    trainer = cls(
        model(),
        arguments(folder, **changes),
        train_dataset=data or texts(),
        eval_dataset=held_out or texts(4),
        data_collator=collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def plain_loss(network):
    ids = torch.tensor([text["input_ids"] for text in texts(4)])
    with torch.no_grad():
        return network.eval()(input_ids=ids, labels=ids).loss.item()


def masked(batches):
    return [int((ids == MASK).sum()) for ids in batches]


def test_training_is_masked_and_evaluation_is_not(tmp_path):
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=2)
    network = trainer.model
    assert masked(network.read[True]) == [6] * 6  # 3 of 23 tokens in each of two rows
    assert set(masked(network.read[False])) == {0}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(network), rel=1e-5)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["meap/masked"] for line in lines] == [6 / 48] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_has_the_masks_of_an_undisturbed_one(tmp_path, workers):
    options = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    whole = run(tmp_path / "whole", **options)
    resumed = run(tmp_path / "more", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert torch.equal(weights(whole), weights(resumed))
    for one, other in zip(whole.model.read[True][6:], resumed.model.read[True], strict=True):
        assert torch.equal(one, other)
    hidden = [tuple((ids == MASK).flatten().tolist()) for ids in whole.model.read[True]]
    assert len(set(hidden)) == 12


def test_the_callback_does_the_same_for_a_plain_trainer(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, seed=5)
    trainer = run(tmp_path, Trainer, collator, [MEAPCallback(collator)], eval_strategy="steps", eval_steps=2)
    network = trainer.model
    assert masked(network.read[True]) == [6] * 6
    assert set(masked(network.read[False])) == {0}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(network), rel=1e-5)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["meap/masked"] > 0 and line["meap/mask_norm"] > 0 for line in lines)
    resumed = run(
        tmp_path / "more", Trainer, collator, [MEAPCallback(collator)], str(tmp_path / "checkpoint-3")
    )
    assert torch.equal(weights(trainer), weights(resumed))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callback_leaves_every_evaluation_clean(tmp_path, workers):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, seed=5)
    trainer = run(
        tmp_path,
        Trainer,
        collator,
        [MEAPCallback(collator)],
        held_out={"one": texts(4), "other": texts(4)},
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        dataloader_num_workers=workers,
    )
    network = trainer.model
    assert masked(network.read[True]) == [6] * 6
    assert masked(network.read[False]) == [0] * 8  # two sets, before the first step and at three others
    assert trainer.evaluate(texts(4))["eval_loss"] == pytest.approx(plain_loss(network), rel=1e-5)


def test_a_second_training_with_the_callback_masks_once(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, seed=5)
    trainer = run(tmp_path, Trainer, collator, [MEAPCallback(collator)])
    loader = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: loader
    for _ in range(2):
        trainer.model.read[True].clear()
        trainer.train()
        assert masked(trainer.model.read[True]) == [6] * 6


def test_epochs_have_masks_of_their_own(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK)
    trainer = run(
        tmp_path,
        Trainer,
        collator,
        [MEAPCallback(collator)],
        data=texts(1),
        per_device_train_batch_size=1,
        max_steps=4,
    )
    assert len({tuple(ids.flatten().tolist()) for ids in trainer.model.read[True]}) == 4


def test_evaluation_with_the_collator_alone_is_told(tmp_path, caplog):
    trainer = run(tmp_path, Trainer, eval_strategy="steps", eval_steps=2)
    assert sum("evaluates on masked inputs" in record.message for record in caplog.records) == 1
    trainer.data_collator.eval()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(trainer.model), rel=1e-5)


def test_without_our_collator_the_trainer_is_the_trainer(tmp_path):
    ours = run(tmp_path / "a", MEAPTrainer, default_data_collator, data=with_labels())
    theirs = run(tmp_path / "b", Trainer, default_data_collator, data=with_labels())
    assert torch.equal(weights(ours), weights(theirs))


def with_labels():
    return [{**text, "labels": text["input_ids"]} for text in texts()]


def test_nothing_masked_is_plain_training(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, mask_ratio=0.0)
    ours = run(tmp_path / "a", MEAPTrainer, collator)
    theirs = run(tmp_path / "b", Trainer, default_data_collator, data=with_labels())
    assert torch.equal(weights(ours), weights(theirs))


def answered(length, seed):
    ids = [*torch.randint(0, 90, (6 + length,), generator=torch.Generator().manual_seed(seed)).tolist(), EOS]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 6 + ids[6:]}


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_copies_count_in_the_mean_over_all_tokens_of_an_accumulated_batch(tmp_path, tokenizer, weight):
    collator = DataCollatorForMEAP(
        DataCollatorForSeq2Seq(tokenizer), tokenizer, mode="sft", copy_loss_weight=weight, seed=2
    )
    data = [answered(60, 1), answered(20, 2), answered(55, 3), answered(90, 4)]
    trainer = run(
        tmp_path,
        MEAPTrainer,
        collator,
        data=data,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
    )
    assert [len(ids) for ids in trainer.model.read[True]] != [2, 2]
    # The same by hand: rows and copies of both micro-batches in one mean.
    network, total, count = model().requires_grad_(False), 0.0, 0.0
    for ids in trainer.model.read[True]:
        for line in ids:
            source = next(row for row in data if same(line, row["input_ids"]))
            kept = line[: len(source["input_ids"])]
            is_copy = bool((kept == MASK).any())
            clean = torch.tensor(source["input_ids"])
            wanted = kept == MASK if is_copy else torch.tensor(source["labels"]) != -100
            logits = network(input_ids=kept[None]).logits[0].double()
            nats = -logits[:-1].log_softmax(-1).gather(1, clean[1:, None])[:, 0]
            share = weight if is_copy else 1.0
            total += share * float(nats[wanted[1:]].sum())
            count += share * float(wanted[1:].sum())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def reads_copies(tokenizer, weight):
    """A collator that makes copies; those of weight 1 have no weights beside them."""
    return DataCollatorForMEAP(
        DataCollatorForSeq2Seq(tokenizer), tokenizer, mode="sft", copy_loss_weight=weight, seed=2
    )


def experts():
    """Its loss has a part that says how even the experts' load is."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            num_local_experts=4,
            num_key_value_heads=2,
            output_router_logits=True,
            router_aux_loss_coef=5.0,
        )
    )


def cycles():
    """Its loss is also that of the passes with fewer cycles."""
    torch.manual_seed(0)
    return ZTTForCausalLM(ZTTConfig(**{**SIZES, "num_hidden_layers": 3}, num_cycles=2, deep_supervision=2.0))


def first_loss(folder, network, collator, **changes):
    data = [answered(60, 1), answered(20, 2), answered(55, 3), answered(90, 4)]
    options = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 2, **changes}
    trainer = MEAPTrainer(network, arguments(folder, **options), train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("make", [experts, cycles])
def test_a_weight_near_one_has_nearly_the_models_own_loss(tmp_path, tokenizer, make):
    own = first_loss(tmp_path, make(), reads_copies(tokenizer, 1.0))
    assert first_loss(tmp_path, make(), reads_copies(tokenizer, 1.0 + 1e-6)) == pytest.approx(own, rel=1e-4)


def test_copies_of_weight_zero_leave_the_loss_of_originals_at_every_depth(tmp_path, tokenizer):
    plain = DataCollatorForMEAP(
        DataCollatorForSeq2Seq(tokenizer), tokenizer, mode="sft", min_answer_tokens=1000
    )
    alone = first_loss(tmp_path, cycles(), plain)
    weighted = first_loss(tmp_path, cycles(), reads_copies(tokenizer, 0.0))
    assert weighted == pytest.approx(alone, rel=1e-5)
    assert first_loss(tmp_path, cycles(), reads_copies(tokenizer, 1.0)) != pytest.approx(alone, rel=1e-5)


def test_copies_weigh_the_same_under_an_adapter(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"]))
    own = first_loss(tmp_path, model(), reads_copies(tokenizer, 0.25))
    assert first_loss(tmp_path, wrapped, reads_copies(tokenizer, 0.25)) == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "function", "found"),
    [
        ({"label_smoothing_factor": 0.1}, None, "found label_smoothing_factor 0.1"),
        ({}, lambda outputs, labels, num_items_in_batch: outputs.logits.sum(), "found a compute_loss_func"),
    ],
)
def test_a_loss_of_another_kind_with_weighted_copies_is_refused(
    tmp_path, tokenizer, changes, function, found
):
    with pytest.raises(InputError, match=f"copy_loss_weight other than 1 .*{found}"):
        MEAPTrainer(
            model(),
            arguments(tmp_path, **changes),
            data_collator=reads_copies(tokenizer, 0.5),
            compute_loss_func=function,
        )


def test_a_model_that_takes_its_loss_elsewhere_is_named(tmp_path, tokenizer):
    class Fused(LlamaForCausalLM):
        """Takes its loss in one with its logits."""

        def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
            outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            outputs.loss = outputs.logits.mean()
            return outputs

    network = Fused(model().config)
    with pytest.raises(InputError, match="loss_function, which Fused didn't call"):
        first_loss(tmp_path, network, reads_copies(tokenizer, 0.5))


def same(line, ids):
    kept = line[: len(ids)]
    return len(kept) == len(ids) and bool(((kept == torch.tensor(ids)) | (kept == MASK)).all())


def test_a_mask_token_without_a_row_is_refused_before_training(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=100)
    with pytest.raises(InputError, match="mask_token_id 100 is beyond the model's embedding of 100 rows"):
        run(tmp_path, collator=collator)
    with pytest.raises(InputError, match="mask_token_id 100 is beyond the model's embedding of 100 rows"):
        run(tmp_path, Trainer, collator, [MEAPCallback(collator)])


def test_copies_behind_originals_are_refused_where_attention_would_let_them_see(tmp_path, tokenizer):
    def trained(cls, network, rows, **fields):
        collator = DataCollatorForMEAP(DataCollatorForSeq2Seq(tokenizer), tokenizer, mode="sft", **fields)
        callbacks = [MEAPCallback(collator)] if cls is Trainer else []
        options = arguments(tmp_path, per_device_train_batch_size=rows)
        return cls(
            network, options, train_dataset=[answered(60, 1)], data_collator=collator, callbacks=callbacks
        )

    network = model()
    assert trained(MEAPTrainer, network, 2, layout="concat").meap is not None
    network.config._attn_implementation = "flash_attention_2"
    message = "layout concat: flash_attention_2 lets copies see their originals .* found 2"
    with pytest.raises(InputError, match=message):
        trained(MEAPTrainer, network, 2, layout="concat")
    with pytest.raises(InputError, match=message):
        trained(Trainer, network, 2, layout="concat").train()
    assert trained(MEAPTrainer, network, 1, layout="concat").meap is not None
    assert trained(MEAPTrainer, network, 2, layout="separate").meap is not None


def test_workers_that_outlive_an_epoch_are_refused_with_the_callback(tmp_path):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK)
    with pytest.raises(InputError, match="persistent workers"):
        run(
            tmp_path,
            Trainer,
            collator,
            [MEAPCallback(collator)],
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
        )


def test_a_weight_of_copies_that_nobody_reads_is_refused_or_told(tmp_path, tokenizer, caplog):
    def weighted():
        return DataCollatorForMEAP(
            DataCollatorForSeq2Seq(tokenizer), tokenizer, mode="sft", copy_loss_weight=0.25
        )

    with pytest.raises(InputError, match=r"MEAPCallback: copy_loss_weight other than 1 .* found 0.25"):
        MEAPCallback(weighted())
    data = [answered(60, 1), answered(20, 2)]
    run(tmp_path / "a", MEAPTrainer, weighted(), data=data, held_out=data, eval_strategy="steps")
    assert "copy_loss_weight" not in caplog.text
    run(tmp_path / "b", Trainer, weighted(), data=data, max_steps=2)
    told = [record.message for record in caplog.records if "copy_loss_weight 0.25" in record.message]
    assert len(told) == 1
    assert "`loss_weights`, which MEAPTrainerMixin reads" in told[0]
