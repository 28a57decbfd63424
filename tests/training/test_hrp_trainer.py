"""HRP in the Hugging Face Trainer: before the optimiser, from the Trainer's own batches, once."""

import json

import pytest
import torch
from torch import nn

from weightsmith.errors import InputError
from weightsmith.training import HRPOptions, HRPTrainer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.seen, self.narrow = [], []

    def forward(self, x, labels=None):
        self.seen.append(x[:, 0].tolist())
        self.narrow.append(torch.is_autocast_enabled("cpu"))
        loss = nn.functional.cross_entropy(self.head(torch.tanh(self.body(x))), labels)
        return {"loss": loss}


def examples(count=40):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=random)
    x[:, 0] = torch.arange(count)
    return [{"x": row, "labels": int(row[1] > 0)} for row in x]


@pytest.fixture
def trainer(tmp_path):
    def make(hrp=None, folder="out", **more):
        model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body", "head"]))
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(tmp_path / folder),
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": 3,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "label_names": ["labels"],
                **more,
            }
        )
        return HRPTrainer(model, arguments, train_dataset=examples(), hrp=hrp or HRPOptions(preheat_steps=2))

    return make


def seen(trainer):
    return trainer.model.base_model.model.seen


def test_the_preheat_is_part_of_the_steps_and_of_the_log(trainer):
    run = trainer()
    result = run.train()
    assert result.global_step == 6
    assert run.args.max_steps == 8
    assert len(seen(run)) == 2 + 6
    first = run.state.log_history[0]
    assert first["hrp/steps"] == 2
    assert first["hrp/first_loss"] == run.hrp_report.losses[0]
    beyond = trainer(HRPOptions(preheat_steps=2, count_preheat=False))
    assert beyond.train().global_step == 8


def test_training_reads_what_it_would_have_read_and_the_preheat_reads_in_another_order(trainer):
    plain = transformers.Trainer(
        peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body"])),
        trainer().args,
        train_dataset=examples(),
    )
    plain.train()
    run = trainer()
    run.train()
    assert seen(run)[2:] == seen(plain)[:6]
    assert seen(run)[:2] != seen(plain)[:2]


def test_adapter_and_optimiser_belong_to_the_small_adapter_alone(trainer):
    run = trainer()
    run.train()
    assert list(run.model.peft_config) == ["default"]
    trained = {id(p) for p in run.model.parameters() if p.requires_grad}
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == trained
    assert run.hrp_report.layers["body"].preheat_rank == 6


def test_micro_batches_add_up_to_the_batch(trainer):
    whole = trainer(per_device_train_batch_size=8)
    parts = trainer(folder="parts", gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert parts.hrp_report.losses == pytest.approx(whole.hrp_report.losses, rel=1e-5)


def test_a_resumed_run_keeps_its_direction_and_ends_as_an_undisturbed_one(trainer, tmp_path):
    undisturbed = trainer()
    undisturbed.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert len(seen(again)) == 3
    wanted = dict(undisturbed.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    saved = json.loads((tmp_path / "out" / "checkpoint-6" / "hrp.json").read_text())
    assert saved == undisturbed.hrp_report.to_json() == again.hrp_report.to_json()


def test_the_preheat_has_the_arithmetic_of_the_training(trainer):
    for narrow in (False, True):
        run = trainer(bf16=narrow)
        run.train()
        assert run.model.base_model.model.narrow == [narrow] * 8


def test_epochs_decide_the_length_where_no_steps_do(trainer):
    run = trainer(HRPOptions(), max_steps=-1, num_train_epochs=2)
    assert run.train().global_step == 20
    assert run.hrp_report.steps == 4  # a fifth of twenty


def test_what_leaves_no_training_is_told(trainer):
    with pytest.raises(InputError, match="preheat_steps: 8 of max_steps=8 leave no training"):
        trainer(HRPOptions(preheat_steps=8)).train()
    run = trainer()
    run.model_init = Net
    with pytest.raises(InputError, match="model_init makes the model too late"):
        run.train()
    run = trainer()
    run.model = Net()
    with pytest.raises(InputError, match="must be a PeftModel"):
        run.train()
