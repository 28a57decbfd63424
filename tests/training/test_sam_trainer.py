"""Two-pass steps inside the Hugging Face Trainer equal the same steps written as a plain loop."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from weightsmith.errors import InputError
from weightsmith.training.adagc.callback import AdaGCCallback
from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.sam import SAM
from weightsmith.training.lightsam.trainer import SAMTrainer

MAKERS = {
    "I": lambda params, **more: LightSAM(params, 0.3, 0.2, "I", **more),
    "III": lambda params, **more: LightSAM(params, 0.02, 0.02, "III", **more),
    "SAM": lambda params, **more: SAM(params, torch.optim.AdamW, lr=0.05, rho=0.1, **more),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Net(torch.nn.Module):
    """Dropout and batch normalisation make the two passes differ unless they are held together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.drop = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x, labels):
        out = self.head(self.drop(torch.tanh(self.norm(self.body(x)))))
        return {"loss": (out - labels).square().mean()}


def data():
    noise = torch.Generator().manual_seed(3)
    return [
        {"x": a, "labels": b}
        for a, b in zip(torch.randn(64, 4, generator=noise), torch.randn(64, 2, generator=noise), strict=True)
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


def run(folder, make, cls=SAMTrainer, resume=None, callbacks=(), model=None, **changes):
    model = model or Net()
    trainer = cls(
        model,
        arguments(folder, **changes),
        train_dataset=data(),
        optimizers=(make(model.parameters()), None),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Recorder(SAMTrainer):
    """Remembers each micro-batch and the random state before it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append((dict(inputs), torch.get_rng_state()))
        return super().training_step(model, inputs, num_items_in_batch)


def same(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@every
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_takes_the_steps_of_a_plain_loop(make, accumulation, tmp_path):
    trainer = run(tmp_path, make, cls=Recorder, max_steps=5, gradient_accumulation_steps=accumulation)
    model = Net()
    optimizer = make(model.parameters(), model=model)
    for step in range(5):
        micro = trainer.seen[step * accumulation : (step + 1) * accumulation]

        def closure(micro=micro):
            optimizer.zero_grad()
            for inputs, state in micro:
                torch.set_rng_state(state)
                (model(**inputs)["loss"] / len(micro)).backward()

        optimizer.step(closure)
    assert len(trainer.seen) == 5 * accumulation
    assert same(model, trainer.model)


@every
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(make, tmp_path):
    whole = run(tmp_path / "whole", make)
    resumed = run(tmp_path / "resumed", make, resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole.model, resumed.model)


def test_other_optimizers_train_as_in_a_plain_trainer(tmp_path):
    def adamw(params):
        return torch.optim.AdamW(params, lr=0.05)

    assert same(run(tmp_path / "a", adamw).model, run(tmp_path / "b", adamw, cls=Trainer).model)


def test_a_plain_trainer_can_not_run_two_passes(tmp_path):
    with pytest.raises(InputError, match="without a step begun"):
        run(tmp_path, MAKERS["III"], cls=Trainer)


def test_clipping_acts_on_the_second_gradient(tmp_path, caplog):
    callback = AdaGCCallback(init="ema", warmup_steps=1)
    run(tmp_path, MAKERS["III"], callbacks=[callback])
    assert callback.clip.steps == 8
    run(tmp_path, MAKERS["I"], max_grad_norm=0.5)
    assert "clips the second gradient" in caplog.text


def test_the_optimizer_can_come_as_class_and_arguments(tmp_path):
    trainer = SAMTrainer(
        Net(), arguments(tmp_path), train_dataset=data(), optimizer_cls_and_kwargs=(LightSAM, {"lr": 0.01})
    )
    trainer.train()
    assert not same(trainer.model, Net())


def test_a_failing_second_pass_leaves_the_weights(tmp_path):
    class Failing(Net):
        calls = 0

        def forward(self, x, labels):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("second pass of the second step")
            return super().forward(x, labels)

    model = Failing()
    with pytest.raises(RuntimeError, match="second pass"):
        run(tmp_path, MAKERS["III"], model=model)
    one = run(tmp_path / "one", MAKERS["III"], max_steps=1)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_a_failing_first_pass_leaves_no_micro_batch_behind(tmp_path):
    class Failing(Net):
        calls = 0

        def forward(self, x, labels):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("second micro-batch")
            return super().forward(x, labels)

    def trained(model, again):
        options = arguments(tmp_path, gradient_accumulation_steps=3)
        optimizers = (MAKERS["III"](model.parameters()), None)
        trainer = SAMTrainer(model, options, train_dataset=data(), optimizers=optimizers)
        if again:
            with pytest.raises(RuntimeError, match="second micro-batch"):
                trainer.train()
            model.norm.reset_running_stats()
        torch.manual_seed(2)
        trainer.train()
        return model

    assert same(trained(Failing(), again=True), trained(Net(), again=False))


def test_deepspeed_is_refused(tmp_path):
    trainer = SAMTrainer(
        Net(), arguments(tmp_path), train_dataset=data(), optimizers=(LightSAM(Net().parameters()), None)
    )
    trainer.is_deepspeed_enabled = True
    with pytest.raises(InputError, match="DeepSpeed"):
        trainer.training_step(trainer.model, {})
