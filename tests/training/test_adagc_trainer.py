"""AdaGC as a callback of the Hugging Face Trainer."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from weightsmith.errors import InputError
from weightsmith.training.adagc.callback import AdaGCCallback
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.adagc.options import AdaGCOptions

OPTIONS = {"warmup_steps": 3, "init": "ema", "beta": 0.9}


class Net(torch.nn.Module):
    """Two layers and the loss a Trainer asks for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x, labels):
        return {"loss": (self.head(torch.tanh(self.body(x))) - labels).square().mean()}


def data():
    noise = torch.Generator().manual_seed(3)
    size = 10.0 ** torch.empty(40, 1).uniform_(-1, 1, generator=noise)
    x = torch.randn(40, 4, generator=noise) * size
    return [{"x": a, "labels": b} for a, b in zip(x, torch.randn(40, 2, generator=noise) * size, strict=True)]


def arguments(folder, **changes):
    fields = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 5,
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**fields, **changes})


def run(folder, callbacks, resume=None, **changes):
    trainer = Trainer(Net(), arguments(folder, **changes), train_dataset=data(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_callback_clips_what_the_optimizer_sees(tmp_path):
    class ByHand(TrainerCallback):
        clip = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.clip = self.clip or AdaGC(model, **OPTIONS)
            self.clip.step()

    by_callback = run(tmp_path / "a", [AdaGCCallback(**OPTIONS)])
    by_hand = run(tmp_path / "b", [ByHand()], max_grad_norm=0.0)
    not_at_all = run(tmp_path / "c", [], max_grad_norm=0.0)
    assert torch.equal(weights(by_callback), weights(by_hand))
    assert not torch.equal(weights(by_callback), weights(not_at_all))


def test_the_trainers_clipping_is_off_during_the_run_with_one_warning(tmp_path, caplog):
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(args.max_grad_norm)

    trainer = run(tmp_path, [AdaGCCallback(**OPTIONS), Spy()], max_grad_norm=0.3)
    assert set(seen) == {0.0}
    assert trainer.args.max_grad_norm == 0.3
    assert sum("max_grad_norm=0.3 is switched off" in record.message for record in caplog.records) == 1


def test_log_lines_say_how_much_was_clipped(tmp_path):
    trainer = run(tmp_path, [AdaGCCallback(**OPTIONS)])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    assert all(0 <= line["adagc/clip_rate"] <= 1 and line["adagc/global_norm"] > 0 for line in lines)
    assert any(0 < line["adagc/min_coef"] < 1 for line in lines)


@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path, restore):
    whole = run(tmp_path / "whole", [AdaGCCallback(**OPTIONS)])
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["AdaGCCallback"]["attributes"]["saved"]["step"] == 10
    resumed = run(
        tmp_path / "resumed",
        [AdaGCCallback(**OPTIONS)],
        resume=str(checkpoint),
        restore_callback_states_from_checkpoint=restore,
    )
    assert torch.equal(weights(whole), weights(resumed))


def test_a_checkpoint_without_clipping_state_warms_up_again_and_says_so(tmp_path, caplog):
    run(tmp_path, [], max_steps=10)
    callback = AdaGCCallback(**OPTIONS)
    run(tmp_path / "b", [callback], resume=str(tmp_path / "checkpoint-10"))
    assert "has no AdaGC state" in caplog.text
    assert callback.clip.steps == 10


def test_gradient_accumulation_clips_once_for_each_optimizer_step(tmp_path):
    callback = AdaGCCallback(**OPTIONS)
    run(tmp_path, [callback], gradient_accumulation_steps=4, max_steps=6)
    assert callback.clip.steps == 6


def test_a_poisoned_batch_empties_the_step_and_the_run_goes_on(tmp_path):
    class Poison(Net):
        steps = 0

        def forward(self, x, labels):
            self.steps += 1
            loss = super().forward(x, labels)["loss"]
            return {"loss": loss * math.nan if self.steps == 8 else loss}

    trainer = Trainer(
        Poison(), arguments(tmp_path), train_dataset=data(), callbacks=[AdaGCCallback(**OPTIONS)]
    )
    trainer.train()
    assert torch.isfinite(weights(trainer)).all()


def test_the_options_build_the_callback(tmp_path):
    callback = AdaGCOptions(lambda_rel=1.5, exclude=("*norm*",)).callback()
    assert callback.options == AdaGCOptions(lambda_rel=1.5, exclude=("*norm*",))
    assert type(callback)(**json.loads(json.dumps(callback.state()["args"]))).options == callback.options


def test_a_step_that_the_loss_scaler_will_skip_leaves_no_trace():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    wrapped = SimpleNamespace(optimizer=optimizer, scaler=scaler)
    callback = AdaGCCallback(warmup_steps=1)
    callback.clip = AdaGC(model, callback.options)
    for factor, steps in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4), torch.ones(2, 2))["loss"] * factor).backward()
        scaler.unscale_(optimizer)
        callback.on_pre_optimizer_step(None, None, None, optimizer=wrapped)
        scaler.step(optimizer)
        scaler.update()
        assert callback.clip.steps == steps
    assert callback.clip.summary()["nonfinite"] == 0


def test_deepspeed_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = str(Path("ds.json"))
    callback = AdaGCCallback()
    with pytest.raises(InputError, match="DeepSpeed"):
        callback.on_train_begin(args, None, None, model=Net())
