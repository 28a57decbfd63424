"""MEAP in the Hugging Face Trainer and in what is made from it, such as TRL's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from weightsmith.errors import InputError
from weightsmith.training.encoding import IGNORED
from weightsmith.training.meap.collator import DataCollatorForMEAP
from weightsmith.training.meap.copies import WEIGHTS, weighing

_Base = Trainer if TYPE_CHECKING else object


class MEAPTrainerMixin(_Base):
    """A Trainer whose `data_collator`, a `DataCollatorForMEAP`, masks batches of training and no others.

    Put it before the Trainer: `class MyTrainer(MEAPTrainerMixin, SFTTrainer)`. Data loaders give clean
    batches; each batch of training is masked where the Trainer takes it, by its step and its place in the
    step, so a resumed run has the masks of an undisturbed one whatever the workers do. With any other
    collator the Trainer stays as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meap: DataCollatorForMEAP | None = None
        if isinstance(self.data_collator, DataCollatorForMEAP):
            self.use_meap(self.data_collator)

    def use_meap(self, collator: DataCollatorForMEAP) -> None:
        """Mask with this collator from now on: for Trainers that take none as an argument and make their own,
        as TRL's `SFTTrainer` does where rows are packed.

        Args:
            collator: Around the Trainer's own, `DataCollatorForMEAP(trainer.data_collator, tokenizer)`.

        Raises:
            InputError: the model has no row for the mask token, or attention that doesn't keep copies behind
                originals apart; or copies are to count otherwise than originals, and the Trainer or the model
                has a loss that isn't by label.

        Example:
            >>> # trainer.use_meap(DataCollatorForMEAP(trainer.data_collator, tokenizer, mode="sft"))
        """
        model = self.accelerator.unwrap_model(self.model)
        collator.check_model(model, self.args.per_device_train_batch_size)
        collator.protect_placeholders(model.config)
        if collator.options.copy_loss_weight != 1:
            self._check_weights()
        self.meap = collator
        self.data_collator = collator.clean

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """As the Trainer's, masked before labels are counted."""
        if self.meap is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        samples, count = super().get_batch_samples(self._masked(epoch_iterator), num_batches, device)
        if samples and WEIGHTS in samples[0] and count is not None:
            labels = torch.stack([(b["labels"][:, 1:] != IGNORED).sum() for b in samples]).sum()
            weighted = torch.stack(
                [((b["labels"] != IGNORED) * b[WEIGHTS])[:, 1:].sum() for b in samples]
            ).sum()
            sums = torch.stack([weighted, labels]).to(device)[None]
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                sums = self.accelerator.gather(sums)
            # As a share of the Trainer's count, which knows what ranks hold the same rows.
            count = count * torch.div(*sums.sum(0))
        return samples, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's; labels of masked copies may count otherwise than those of originals."""
        if WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with weighing(self._network(model), inputs.pop(WEIGHTS)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with `meap/masked`: the share of tokens masked since the last line."""
        if self.meap is not None and "loss" in logs:
            logs["meap/masked"] = self.meap.fraction()
        super().log(logs, *args, **kwargs)

    def _check_weights(self) -> None:
        network = self._network(self.model)
        found = None
        if self.args.label_smoothing_factor:
            found = f"label_smoothing_factor {self.args.label_smoothing_factor:g}"
        elif self.compute_loss_func is not None:
            found = "a compute_loss_func"
        elif getattr(network, "loss_function", None) is not ForCausalLMLoss:
            found = f"a {type(network).__name__}, whose loss_function isn't that of causal models"
        if found is not None:
            raise InputError(
                "copy_loss_weight other than 1 weighs labels in the cross-entropy of a causal model of "
                f"transformers, found {found}"
            )

    def _network(self, model: Any) -> Any:
        """The model that takes the loss, out of what is around it."""
        network: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return network.get_base_model() if hasattr(network, "get_base_model") else network  # PEFT's

    def _masked(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        assert self.meap is not None
        for micro_step, batch in enumerate(batches):
            yield self.meap.mask(dict(batch), (self.state.global_step, micro_step))


class MEAPTrainer(MEAPTrainerMixin, Trainer):
    """A Trainer that masks batches of training and evaluates on clean ones.

    Example:
        >>> # MEAPTrainer(model, args, train_dataset=data, data_collator=DataCollatorForMEAP(base, tokenizer))
    """


class MEAPCallback(TrainerCallback):
    """Masks a plain Trainer's batches of training and no others, and logs what is masked.

    The collator itself makes clean batches from here on, whatever they are for; only the loader that a
    training reads from masks what it collates. Adds `meap/masked`, the share of tokens masked since the last
    line, and `meap/mask_norm`, the norm of the mask token's embedding. With `dataloader_persistent_workers`
    the workers hold copies of the collator that nothing reaches: take `MEAPTrainerMixin` there.

    Args:
        collator: The Trainer's `data_collator`.

    Raises:
        InputError: copies are to count otherwise than originals, which a plain Trainer's loss can't; when
            training begins, persistent workers, or a model that can't be trained so.

    Example:
        >>> # Trainer(model, args, data_collator=collator, callbacks=[MEAPCallback(collator)])
    """

    def __init__(self, collator: DataCollatorForMEAP) -> None:
        if collator.options.copy_loss_weight != 1:
            raise InputError(
                "MEAPCallback: copy_loss_weight other than 1 needs MEAPTrainerMixin, found "
                f"{collator.options.copy_loss_weight:g}"
            )
        self.collator = collator
        self._loader: Any = None
        self._collate: Callable[[Any], dict[str, Any]] | None = None
        collator.eval()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model's embedding, and mask what this training's loader makes."""
        if args.dataloader_persistent_workers and args.dataloader_num_workers:
            raise InputError(
                "MEAPCallback: persistent workers (dataloader_persistent_workers) keep their own copy of the "
                "collator; take MEAPTrainerMixin"
            )
        self.collator.check_model(kwargs["model"], args.per_device_train_batch_size)
        self.collator.protect_placeholders(kwargs["model"].config)
        self._loader = own_loader(kwargs["train_dataloader"])
        self._collate = self._loader.collate_fn
        self._loader.collate_fn = partial(_masked, self._collate, self.collator)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Other masks for each epoch."""
        self.collator.set_epoch(int(state.epoch or 0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the loader its collator back: a Trainer may keep it for the next training."""
        self._loader.collate_fn = self._collate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the two numbers to a line of training."""
        if logs is None or "loss" not in logs:
            return
        row = kwargs["model"].get_input_embeddings().weight[self.collator.mask_token_id]
        more = {"meap/mask_norm": float(row.detach().float().norm())}
        if args.dataloader_num_workers == 0:  # workers count for themselves
            more["meap/masked"] = self.collator.fraction()
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)


def own_loader(loader: Any) -> Any:
    """The loader that collates: accelerate's wrapper only passes on what it holds."""
    return getattr(loader, "base_dataloader", loader)


def _masked(
    collate: Callable[[Any], dict[str, Any]], collator: DataCollatorForMEAP, features: Any
) -> dict[str, Any]:
    """A batch of training; no closure, since workers that are spawned get it pickled."""
    return collator.mask(collate(features))
