"""MEAP in TRL's SFTTrainer: masked copies in training, clean evaluation, packed and padded rows."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weightsmith.testbed import write_model_folder
from weightsmith.training import DataCollatorForMEAP, MEAPTrainerMixin

trl = pytest.importorskip("trl")

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "meap.md"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(write_model_folder("xs", tmp_path_factory.mktemp("bed")))


def trained(tokenizer, folder, **changes):
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    read = {True: [], False: []}

    class Watching(MEAPTrainerMixin, trl.SFTTrainer):
        """Remembers what the model reads in training and out of it."""

        def compute_loss(self, model, inputs, *more, **options):
            read[model.training].append((inputs["input_ids"].clone(), inputs["labels"].clone()))
            return super().compute_loss(model, inputs, *more, **options)

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    rows = [{"prompt": f"Count {n}: ", "completion": "one, two, three, " * 4} for n in range(8)]
    meap = DataCollatorForMEAP(DataCollatorForLanguageModeling(tokenizer.pad_token_id), tokenizer, mode="sft")
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_length=128,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        logging_steps=1,
        **changes,
    )
    trainer = Watching(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=None if arguments.packing else meap,
        processing_class=tokenizer,
    )
    if arguments.packing:  # where it packs, TRL takes no collator
        trainer.use_meap(DataCollatorForMEAP(trainer.data_collator, tokenizer, mode="sft"))
    trainer.train()
    return trainer, read


def test_padded_rows_get_a_masked_copy_in_training_and_none_in_evaluation(tokenizer, tmp_path):
    trainer, read = trained(tokenizer, tmp_path)
    assert len(read[True]) == 2
    for ids, labels in read[True]:
        hidden = ids == tokenizer.mask_token_id
        assert len(ids) == 4
        assert not hidden[:2].any()
        assert hidden[2:].sum(1).tolist() == [6, 6]  # a tenth of 69 tokens: the answer and its end
        assert torch.equal(labels[2:] != -100, hidden[2:])
        assert torch.equal(labels[2:][hidden[2:]], ids[:2][hidden[2:]])
    assert len(read[False]) == 4
    assert all(len(ids) == 2 and not (ids == tokenizer.mask_token_id).any() for ids, _ in read[False])
    assert any("meap/masked" in line for line in trainer.state.log_history)


def test_packed_rows_get_their_copies_as_further_documents(tokenizer, tmp_path):
    _, read = trained(tokenizer, tmp_path, packing=True)
    ids, labels = read[True][0]
    hidden = ids == tokenizer.mask_token_id
    assert len(ids) == 1
    assert not hidden[:, : ids.shape[1] // 2].any()
    assert torch.equal((labels != -100)[hidden], torch.ones(int(hidden.sum()), dtype=torch.bool))
    assert hidden.sum() == 12
    assert not any((ids == tokenizer.mask_token_id).any() for ids, _ in read[False])


def test_the_pages_example_with_trl_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (collator,) = [block for block in blocks if "DataCollatorForSeq2Seq" in block]
    (example,) = [block for block in blocks if "from trl" in block]
    exec("import torch\n" + collator + example, {"__name__": "page"})
