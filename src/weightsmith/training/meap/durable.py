"""MEAP in the loop behind the stages `train` and `finetune`: masked batches that a killed run makes again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from weightsmith.runs.seeds import derive
from weightsmith.training.encoding import IGNORED
from weightsmith.training.meap.collator import DataCollatorForMEAP
from weightsmith.training.meap.options import MEAPOptions
from weightsmith.training.meap.tokens import resolve_mask_token, strip_mask_token
from weightsmith.training.meap.trainer import own_loader


class MaskedBatches(TrainerCallback):
    """Masks the batches of a run by their number, and takes an added mask token away at its end.

    The loop's loader makes batches in this process, in order, and a resumed run doesn't make those that it
    skips; so counting them from the step on gives each batch the number that it has in an undisturbed run.

    Args:
        options: What is masked.
        tokenizer: The model's; gets the mask token where one is added.
        network: The model in training; grows where a token is added.
        seed: The run's seed.

    Raises:
        InputError: no token to mask with; when training begins, a model that can't be trained so.
    """

    def __init__(self, options: MEAPOptions, tokenizer: Any, network: Any, seed: int) -> None:
        self._tokenizer, self._network = tokenizer, network
        self._mask = resolve_mask_token(
            tokenizer, network, options.mask_token, add_mask_token=options.add_mask_token
        )
        self._options = dataclasses.replace(options, add_mask_token=False)
        self._seed = derive(seed, "meap")
        self._number, self._per_step = 0, 1
        self._state: Any = None
        self._collator: DataCollatorForMEAP | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the collator around the loader's own."""
        loader = own_loader(kwargs["train_dataloader"])
        self._state, self._per_step = state, args.gradient_accumulation_steps
        self._number = state.global_step * self._per_step
        self._collator = self._around(loader.collate_fn)
        self._collator.check_model(self._network, args.per_device_train_batch_size)
        loader.collate_fn = self._collate(self._collator)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the share of tokens masked since the last line."""
        if self._collator is not None and logs is not None and "loss" in logs:
            logs["meap/masked"] = self._collator.fraction()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave model and tokenizer as they were."""
        if self._mask.is_added:
            strip_mask_token(self._network, self._tokenizer, self._mask)

    def mask(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """A batch of clean windows as batch `number` of the run would have it, for who trains before it
        begins.
        """
        return _masked(self._around(lambda features: features), batch, (number, 0))

    def _around(self, collate: Callable[[Any], dict[str, Any]]) -> DataCollatorForMEAP:
        return DataCollatorForMEAP(
            collate, self._tokenizer, mask_token_id=self._mask.id, options=self._options, seed=self._seed
        )

    def _collate(self, collator: DataCollatorForMEAP) -> Callable[[Any], dict[str, Any]]:
        def collate(features: Any) -> dict[str, Any]:
            batch = collator.clean(features)
            if self._state.global_step >= self._state.max_steps:
                return batch  # training is over: an average measures losses
            position = divmod(self._number, self._per_step)
            self._number += 1
            return _masked(collator, batch, position)

        return collate


def _masked(
    collator: DataCollatorForMEAP, batch: dict[str, Any], position: tuple[int, int]
) -> dict[str, Any]:
    # Behind its last label a row has padding, or nothing that a loss depends on.
    counts = (batch["labels"] != IGNORED).flip(1).cumsum(1).flip(1) > 0
    masked = collator.mask({**batch, "attention_mask": counts.to(torch.long)}, position)
    return {key: value for key, value in masked.items() if key != "attention_mask"}
