"""TRL's SFTTrainer with the mixins of HRP and of zeroth-order training; `test_meap_trl.py` has MEAP's."""

import json

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weightsmith.testbed import write_model_folder
from weightsmith.training import HRPOptions, HRPTrainerMixin, TeZOAdam, ZOTrainerMixin

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(write_model_folder("xs", tmp_path_factory.mktemp("bed")))


def made(mixin, tokenizer, folder, changes=(), **more):
    from datasets import Dataset

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    rows = [{"prompt": f"Count {n}: ", "completion": "one, two, three, " * 4} for n in range(16)]
    arguments = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "max_length": 128,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "learning_rate": 0.01,
            **dict(changes),
        }
    )
    kind = type("Mine", (mixin, trl.SFTTrainer), {})
    data = Dataset.from_list(rows)
    return kind(model, arguments, train_dataset=data, processing_class=tokenizer, **more)


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_hrp_finds_the_direction_of_trls_adapter(tokenizer, tmp_path, changes):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = made(
        HRPTrainerMixin, tokenizer, tmp_path, changes, peft_config=config, hrp=HRPOptions(preheat_steps=2)
    )
    trainer.train()
    assert len(trainer.hrp_report.losses) == 2
    assert set(trainer.hrp_report.layers) == {f"model.layers.0.self_attn.{kind}_proj" for kind in "qv"}
    assert trainer.state.global_step == 4  # the preheat's are part of the six
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    (report,) = tmp_path.glob("checkpoint-*/hrp.json")
    assert json.loads(report.read_text())


def test_tezo_trains_trls_model_without_gradients(tokenizer, tmp_path):
    trainer = made(ZOTrainerMixin, tokenizer, tmp_path, {"max_steps": 3})
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.optimizer = TeZOAdam(trainer.model.named_parameters(), 1e-3, rank=4)
    trainer.train()
    assert trainer.state.global_step == 3
    for name, value in trainer.model.named_parameters():
        assert value.grad is None
        assert not torch.equal(value, before[name]), name
