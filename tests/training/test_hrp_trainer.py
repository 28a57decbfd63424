"""HRP in the Hugging Face Trainer: before the optimiser, from the Trainer's own batches, once."""

import json
import shutil

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
    def make(hrp=None, folder="out", data=None, rank=2, **more):
        model = peft.get_peft_model(Net(), peft.LoraConfig(r=rank, target_modules=["body", "head"]))
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
        data = examples() if data is None else data
        return HRPTrainer(model, arguments, train_dataset=data, hrp=hrp or HRPOptions(preheat_steps=2))

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


def test_the_preheat_has_the_rate_of_the_training_and_an_optimiser_of_your_own_has_its_own(trainer):
    made = []

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[-1]

    ways = [{"preheat_optimizer": "sgd"}, {"preheat_optimizer": "sgd", "preheat_lr": 0.01}]
    ways.append({"preheat_optimizer": optimizer})
    losses = []
    for way in ways:
        run = trainer(HRPOptions(preheat_steps=2, **way))
        run.train()
        losses.append(run.hrp_report.losses)
    assert losses[0] == losses[1] != losses[2]
    assert [group["lr"] for group in made[0].param_groups] == [0.5]


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


SHARED = HRPOptions(preheat_steps=2, rank_energy=2.0)


@pytest.mark.parametrize("named", [True, False], ids=["named", "the last one"])
@pytest.mark.parametrize(
    ("hrp", "ranks"), [(None, [3, 3]), (SHARED, [4, 2])], ids=["ranks as given", "ranks shared out"]
)
def test_a_resumed_run_keeps_its_direction_and_ends_as_an_undisturbed_one(
    trainer, tmp_path, hrp, ranks, named
):
    undisturbed = trainer(hrp, rank=3)
    undisturbed.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again = trainer(hrp, rank=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3") if named else True)
    assert len(seen(again)) == 3
    assert [layer.rank for layer in again.hrp_report.layers.values()] == ranks
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
    assert run.train().global_step == 20 - 4  # a fifth of twenty is the preheat's
    assert run.hrp_report.steps == 4
    assert run.args.max_steps == -1
    assert len(seen(run)) == 20
    beyond = trainer(HRPOptions(count_preheat=False), max_steps=-1, num_train_epochs=2)
    assert beyond.train().global_step == 20


def test_an_epoch_that_ends_within_a_step_is_counted_as_the_trainer_counts_it(trainer):
    run = trainer(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4)
    assert run.train().global_step == 2 * 3 - 2  # ten batches are three steps


def test_train_called_again_goes_on_with_the_adapter_that_is_there(trainer):
    run = trainer()
    run.train()
    report, before = run.hrp_report, len(seen(run))
    assert run.train().global_step == 8  # no preheat, nothing to count
    assert len(seen(run)) - before == 8
    assert run.hrp_report is report
    assert "hrp/steps" not in run.state.log_history[0]


def test_data_of_less_than_a_batch_is_told(trainer):
    with pytest.raises(InputError, match="dataloader is empty"):
        trainer(data=examples(3), dataloader_drop_last=True).train()


class Stream(torch.utils.data.IterableDataset):
    """Samples in one order, as often as they are asked for."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Once(Stream):
    def __init__(self, samples):
        super().__init__(samples)
        self.left = iter(samples)

    def __iter__(self):
        return self.left


def test_a_stream_is_read_from_its_head_by_the_preheat_and_by_training(trainer):
    run = trainer(data=Stream(examples()))
    run.train()
    plain = trainer(HRPOptions(preheat_steps=1, count_preheat=False), "plain", data=Stream(examples()))
    plain.train()
    assert seen(run)[2:] == seen(plain)[1:7]
    assert seen(run)[:2] == seen(run)[2:4]


def test_a_stream_that_has_nothing_or_nothing_twice_is_told(trainer):
    with pytest.raises(InputError, match="train_dataset is empty: the preheat has nothing to learn from"):
        trainer(data=Stream([])).train()
    with pytest.raises(
        InputError, match="train_dataset can be read only once, and the preheat reads its head"
    ):
        trainer(data=Once(examples())).train()


def test_a_checkpoint_of_another_adapter_is_told(trainer, tmp_path):
    trainer().train()
    file = tmp_path / "out" / "checkpoint-3" / "hrp.json"
    file.write_text(file.read_text().replace('"body"', '"other"'))
    with pytest.raises(InputError, match=r"hrp\.json is of another adapter: body is in one of the two alone"):
        trainer().train(resume_from_checkpoint=str(file.parent))


def test_what_leaves_no_training_is_told(trainer):
    with pytest.raises(InputError, match="preheat_steps: 8 of the run's 8 steps leave no training"):
        trainer(HRPOptions(preheat_steps=8)).train()
    run = trainer()
    run.model_init = Net
    with pytest.raises(InputError, match="model_init makes the model too late"):
        run.train()
    run = trainer()
    run.model = Net()
    with pytest.raises(InputError, match="must be a PeftModel"):
        run.train()
