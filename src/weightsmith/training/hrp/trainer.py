"""HRP in the Hugging Face Trainer and in what is made from it, such as TRL's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_json
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.hrp.initialize import initialize_lora_hrp_weights, take_ranks
from weightsmith.training.hrp.options import HRPOptions
from weightsmith.training.hrp.preheat import active_adapter, peft_configs
from weightsmith.training.hrp.report import FILE, HRPReport
from weightsmith.training.hrp.steps import endless

_Base = Trainer if TYPE_CHECKING else object


class HRPTrainerMixin(_Base):
    """A Trainer that finds the direction of its model's LoRA adapter before anything of the training is made.

    Put it before the Trainer: `class MyTrainer(HRPTrainerMixin, SFTTrainer)`. The preheat has the Trainer's
    own batches, its loss, its learning rate and its number of micro-batches. It reads them in an order of its
    own, but for an `IterableDataset`, which has one order: the preheat reads its head, and training begins
    there again. The preheat's steps are part of the run's (`count_preheat`), whether `max_steps` or
    `num_train_epochs` sets them. It is done once: a run that goes on from a checkpoint, and `train()` called
    again, go on with the adapter that is there. `hrp.json` lies beside every saved adapter.

    Args:
        *args: As the Trainer's; the model is a `PeftModel` with a fresh LoRA adapter.
        hrp: Settings.
        hrp_progress: Told about the preheat's steps in place of a bar.
        **kwargs: As the Trainer's.
    """

    def __init__(
        self,
        *args: Any,
        hrp: HRPOptions | None = None,
        hrp_progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.hrp = hrp or HRPOptions()
        self.hrp_report: HRPReport | None = None
        self._hrp_begins = False
        self._hrp_progress = hrp_progress
        self.add_callback(_Tell(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, after the preheat.

        Raises:
            InputError: as `initialize_lora_hrp_weights`; `model_init`, whose model is made too late; data
                that can be read only once; a checkpoint whose `hrp.json` is of another adapter.
        """
        if self.model_init is not None:
            raise InputError("HRPTrainerMixin: model_init makes the model too late; give the model")
        checkpoint = self._hrp_checkpoint(resume_from_checkpoint)
        self._hrp_begins = checkpoint is None and self.hrp_report is None
        most, total = self.args.max_steps, self._hrp_total()
        steps = self.hrp.steps_of(total)
        if self.hrp.count_preheat and (self._hrp_begins or checkpoint is not None):
            if steps >= total:
                raise InputError(f"preheat_steps: {steps} of the run's {total} steps leave no training")
            self.args.max_steps = total - steps
        try:
            if self._hrp_begins:
                self._hrp_begin(steps)
            elif checkpoint is not None:
                self._hrp_go_on(checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.max_steps = most

    def _hrp_checkpoint(self, resume: str | bool | None) -> Path | None:
        """The checkpoint to go on from; the Trainer itself tells where there is none."""
        last = get_last_checkpoint(self.args.output_dir) if resume is True else resume
        return Path(last) if last else None

    def _hrp_total(self) -> int:
        """Steps of the run, as the Trainer counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = len(self.get_train_dataloader())
        per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(per_epoch * self.args.num_train_epochs)

    def _hrp_go_on(self, checkpoint: Path) -> None:
        """What was found in the run that the checkpoint is of, and the ranks that its adapter has."""
        file = checkpoint / FILE
        self.hrp_report = HRPReport.from_json(read_json(file)) if file.exists() else None
        if self.hrp_report is not None:
            model: Any = self.accelerator.unwrap_model(self.model)
            ranks = {name: layer.rank for name, layer in self.hrp_report.layers.items()}
            take_ranks(model, ranks, file, adapter_name=_active(model))

    def _hrp_begin(self, steps: int) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        options = dataclasses.replace(self.hrp.at_rate(self.args.learning_rate), preheat_steps=steps)
        batches = self._hrp_batches(steps * self.args.gradient_accumulation_steps)

        def train_step(model: nn.Module, number: int) -> torch.Tensor:
            samples, items = self.get_batch_samples(
                batches, self.args.gradient_accumulation_steps, self.args.device
            )
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and items is not None
            )
            total = torch.zeros((), device=self.args.device)
            for position, inputs in enumerate(samples):
                # The engine that training will have around the model isn't there yet, nor its arithmetic.
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    loss: Any = self.compute_loss(
                        model, self._prepare_inputs(inputs), num_items_in_batch=items
                    )
                loss = loss if scaled else loss / len(samples)
                if position < len(samples) - 1:
                    loss.backward()
                    loss = loss.detach()
                total = total + loss
            return total

        try:
            self.hrp_report = initialize_lora_hrp_weights(
                model,
                train_step=train_step,
                options=options,
                adapter_name=_active(model),
                show_progress_bar=not self.args.disable_tqdm,
                progress=self._hrp_progress,
            )
        finally:
            batches.close()

    def _hrp_batches(self, wanted: int) -> Generator[Any]:
        """Batches in an order that training won't have, without end; made when the preheat's random states
        are those that come back.
        """
        data = self.train_dataset
        if isinstance(data, IterableDataset):
            if iter(data) is iter(data):
                raise InputError(
                    "train_dataset can be read only once, and the preheat reads its head before training "
                    "does: expected one that begins anew with each iter()"
                )
            if not any(True for _ in data):  # accelerate tells of this in words of its own
                raise InputError("train_dataset is empty: the preheat has nothing to learn from")
        torch.manual_seed(derive(self.args.seed, "hrp data") % 2**63)
        loader = self.get_train_dataloader()
        try:
            yield from endless(loader, wanted)
        finally:
            if hasattr(loader, "end"):  # accelerate takes a loader that was left for the one in use
                loader.end()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.hrp_report is not None:
            self.hrp_report.save(output_dir or self.args.output_dir or ".")


def _active(model: Any) -> str:
    """The adapter to initialise; a model without one is told so later."""
    return (active_adapter(model) if peft_configs(model) else None) or "default"


class HRPTrainer(HRPTrainerMixin, Trainer):
    """A Trainer whose LoRA adapter begins in the direction that HRP finds.

    Example:
        >>> # HRPTrainer(get_peft_model(model, config), args, train_dataset=data,
        hrp=HRPOptions(preheat_steps=50))
    """


class _Tell(TrainerCallback):
    """Log what the preheat did, once everything that logs is set up."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write one line."""
        report = self._trainer.hrp_report
        if not self._trainer._hrp_begins:
            return
        self._trainer.log(
            {
                "hrp/steps": report.steps,
                "hrp/first_loss": report.losses[0],
                "hrp/last_loss": report.losses[-1],
                "hrp/captured": report.captured,
            }
        )
