"""Zeroth-order steps inside the Hugging Face Trainer equal the same steps written as a plain loop."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from weightsmith.errors import InputError
from weightsmith.training import LOZO, MeZO, TeZO, TeZOAdam, ZOTrainer
from weightsmith.training.lightsam.trainer import SAMTrainerMixin
from weightsmith.training.tezo.trainer import zeroth_order_optimizer

MAKERS = {
    "TeZO": lambda params: TeZO(params, 0.05, rank=2),
    "TeZO-Adam": lambda params: TeZOAdam(params, 0.05, rank=2, restore="snapshot"),
    "MeZO": lambda params: MeZO(params, 0.05),
    "LOZO": lambda params: LOZO(params, 0.05, rank=2, interval=3),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 6)
        self.drop = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(6, 2)
        self.double()  # differences of close losses: float32 rounds sums of parts otherwise

    def forward(self, x, labels):
        out = self.head(self.drop(torch.tanh(self.body(x))))
        return {"loss": (out - labels).square().mean()}


def data():
    noise = torch.Generator().manual_seed(3)
    return [
        {"x": a, "labels": b}
        for a, b in zip(
            torch.randn(64, 4, generator=noise).double(),
            torch.randn(64, 2, generator=noise).double(),
            strict=True,
        )
    ]


def arguments(folder, **changes):
    fields = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_steps": 4,
        "logging_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**fields, **changes})


def run(folder, make, cls=ZOTrainer, resume=None, **changes):
    model = Net()
    trainer = cls(
        model, arguments(folder, **changes), train_dataset=data(), optimizers=(make(model.parameters()), None)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Recorder(ZOTrainer):
    """Remembers each micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


@every
@pytest.mark.parametrize("parts", [1, 2])
def test_a_trainer_takes_the_steps_of_a_plain_loop(make, parts, tmp_path):
    trainer = run(tmp_path, make, Recorder, gradient_accumulation_steps=parts)
    model = Net().eval()
    optimizer = make(model.named_parameters())
    losses = []
    for start in range(0, len(trainer.seen), parts):
        batch = trainer.seen[start : start + parts]
        losses.append(
            optimizer.step(lambda batch=batch: sum(model(**inputs)["loss"] for inputs in batch) / parts)
        )
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), weight, rtol=1e-6, atol=1e-8)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    means = torch.stack(losses).reshape(2, 4).mean(1).tolist()
    assert logged == pytest.approx(means, rel=1e-3)
    assert not any("grad_norm" in line for line in trainer.state.log_history)


@every
def test_a_stopped_run_goes_on_bit_for_bit(make, tmp_path):
    whole = run(tmp_path / "whole", make)
    resumed = run(tmp_path / "whole", make, resume=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name))


def test_modes_come_back_and_names_are_the_models(tmp_path):
    trainer = run(tmp_path, MAKERS["TeZO"])
    assert trainer.model.drop.training
    names = {piece.name for piece in trainer.optimizer.optimizer.pieces()}
    assert names == {"body.weight", "head.weight", "body.bias", "head.bias"}


def test_another_optimizer_trains_as_in_a_plain_trainer(tmp_path):
    weights = []
    for cls in (Trainer, ZOTrainer, type("Both", (SAMTrainerMixin, Trainer), {})):
        trainer = run(tmp_path, lambda params: torch.optim.AdamW(params, 0.05), cls, max_grad_norm=1.0)
        weights.append(dict(trainer.model.named_parameters()))
        assert any("grad_norm" in line for line in trainer.state.log_history)
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)


def test_a_loss_without_derivative_and_a_useless_clip(tmp_path, caplog):
    class Metric(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 1.0 - float((model(**inputs)["loss"] < 1).float())

    with caplog.at_level(logging.WARNING):
        run(tmp_path, MAKERS["MeZO"], Metric, max_grad_norm=1.0)
    assert caplog.text.count("max_grad_norm=1 is ignored: there are no gradients") == 1


def test_a_loss_of_several_numbers_is_refused(tmp_path):
    class Rows(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.ones(3)

    with pytest.raises(InputError, match=r"the loss must be one number, got shape \(3,\)"):
        run(tmp_path, MAKERS["MeZO"], Rows)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("is_deepspeed_enabled", "DeepSpeed keeps weights to itself"),
        ("is_fsdp_enabled", "the Trainer's FSDP exchanges parameters behind the optimiser"),
    ],
)
def test_a_trainer_that_shards_is_refused(tmp_path, switch, message):
    class Sharding(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            setattr(self, switch, True)
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(InputError, match=message):
        run(tmp_path, MAKERS["MeZO"], Sharding)


def test_a_loss_scaler_that_waits_for_gradients_is_let_go(tmp_path):
    """As accelerate sets it under fp16, which needs a GPU."""

    class Scaled(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self._waiting is None:
                self.optimizer.scaler = torch.amp.GradScaler("cpu")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = run(tmp_path, MAKERS["TeZO"], Scaled)
    plain = run(tmp_path, MAKERS["TeZO"])
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, trainer.model.get_parameter(name))


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_training_begins_without_what_an_interrupted_one_left(tmp_path, broken):
    """Broken off between two micro-batches, and between the probes and their step."""

    class Breaking(ZOTrainer):
        breaks_after = 0
        prepared = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.breaks_after -= 1
            if self.breaks_after == 0:
                raise KeyboardInterrupt
            return loss

        def _prepare_for_probes(self):
            self.prepared += 1
            super()._prepare_for_probes()

    trainers = []
    for interrupted in (True, False):
        model = Net()
        trainer = Breaking(
            model,
            arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2, save_strategy="no"),
            train_dataset=data(),
            optimizers=(MAKERS["TeZO"](model.parameters()), None),
        )
        trainers.append(trainer)
        if interrupted:
            trainer.breaks_after = broken
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            model.load_state_dict(Net().state_dict())
            zeroth_order_optimizer(trainer.optimizer).param_groups[0]["step"] = 0
        torch.manual_seed(7)  # order of the data
        trainer.train()
        assert trainer.prepared == 1 + interrupted
    for name, weight in trainers[0].model.named_parameters():
        torch.testing.assert_close(weight, trainers[1].model.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_language_model_with_token_counts_steps_as_on_one_large_batch(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    rows = []
    for start in range(16):
        labels = torch.arange(start, start + 8) % 16
        labels[: start % 5] = -100  # rows of unequal weight
        rows.append({"input_ids": torch.arange(start, start + 8) % 16, "labels": labels})
    weights = []
    for batch, parts in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "max_steps": 3}
        trainer = ZOTrainer(
            model,
            arguments(tmp_path, **more),
            train_dataset=rows,
            optimizer_cls_and_kwargs=(TeZO, {"lr": 0.01, "rank": 2, "rho": 0.05}),
        )
        trainer.train()
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5)
