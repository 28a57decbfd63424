"""The Hugging Face Trainer with checkpoints that survive a kill and give back every bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from weightsmith.evaluation.models import choose_device
from weightsmith.runs.atomic import sync_folder
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.alphadecay.groups import one_group_each
from weightsmith.training.alphadecay.matrices import find_matrices
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.averaging.callback import AveragingCallback
from weightsmith.training.config import TrainConfig
from weightsmith.training.lightsam.trainer import SAMTrainerMixin

PREFIX = "checkpoint-"
WEIGHTS = "weights.safetensors"


class DurableTrainer(SAMTrainerMixin, Trainer):
    """A Trainer whose checkpoints `folder/checkpoint-<step>` are complete or not there.

    Args:
        folder: Where they are.
        keep: How many of them are kept.
        decay: AlphaDecay's options where it needs a parameter group for each matrix: they have to be there
            before the learning rate's schedule is made.
        arguments: As `Trainer` takes them; `args.output_dir` is scratch space inside `folder`.
    """

    def __init__(
        self, *, folder: Path, keep: int, decay: AlphaDecayOptions | None = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._folder, self._keep, self._decay = folder, keep, decay
        self._scratch = Path(arguments["args"].output_dir)
        self._network, self._examples = arguments["model"], arguments["train_dataset"]
        self.remove_callback(PrinterCallback)  # prints every log line; ours go to metrics.jsonl

    def durable(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self._folder.glob(f"{PREFIX}*"), key=_step)

    def last_durable(self) -> Path | None:
        """The checkpoint to continue from."""
        return self.durable()[-1] if self.durable() else None

    def forget(self) -> None:
        """Delete all checkpoints."""
        for folder in self.durable():
            discard(folder)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the Trainer's, each matrix of AlphaDecay in a group of its own where it asks for that."""
        optimizer = super().create_optimizer(model)
        if self._decay is not None and self._decay.mode == "groups":
            matrices, _ = find_matrices(self._network, self._decay)
            one_group_each(optimizer, {id(matrix.parameter) for matrix in matrices}, scheduled=False)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A running mean is part of the checkpoint, so it has to be there first.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AveragingCallback):
                callback.on_save(self.args, self.state, self.control, model=self._network)
        shutil.rmtree(self._scratch, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        saved = self._scratch / f"{PREFIX}{self.state.global_step}"
        for file in saved.iterdir():
            _sync(file)
        sync_folder(saved)
        target = self._folder / saved.name
        if target.exists():  # the last step of a run that was killed while it wrote its result
            discard(target)
        os.rename(saved, target)
        sync_folder(self._folder)
        for folder in self.durable()[: -self._keep]:
            discard(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self._scratch)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self._network, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(self._network, os.path.join(resume_from_checkpoint, WEIGHTS))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self._examples)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = folder.with_name(f".discarded-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def training_arguments(config: TrainConfig, scratch: Path, seed: int) -> TrainingArguments:
    """The Trainer's settings for a resolved config."""
    device = choose_device(config.device)
    beta1, beta2 = config.betas or (0.9, 0.999)  # without effect where an optimiser has its own
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate or 0.0,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        max_grad_norm=0.0 if isinstance(config.clip, AdaGCOptions) else config.clip,
        optim="adamw_torch_fused",
        bf16=config.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        seed=seed % 2**32,  # numpy's generator takes no more
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # would hide the loss that `Metrics` looks for
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one device: DataParallel would multiply the batch the page asks for
    return arguments


def _step(folder: Path) -> int:
    return int(folder.name[len(PREFIX) :])


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
