"""MEAP as a data collator: around any other one, for any tokenizer, in the Trainer or in a loop."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.runs.seeds import derive
from weightsmith.training.encoding import IGNORED
from weightsmith.training.meap import answers, copies
from weightsmith.training.meap.masking import (
    authors_places,
    check_ids,
    is_any,
    meap_mask_inputs,
    mixed,
    position_keys,
    signed,
)
from weightsmith.training.meap.options import MUCH, MEAPOptions
from weightsmith.training.meap.tokens import check_mask_id, in_clean_text, resolve_mask_token

logger = logging.getLogger(__name__)

LOOKED_THROUGH = 10
"""Batches in which the mask token is looked for: it must not be in clean text."""
# Placeholders that a processor puts where images, sound and video go, as tokenizers and configs name them.
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)


class DataCollatorForMEAP:
    """Collates with another collator, then masks inputs; labels stay clean.

    `mode="pretrain"` masks a share of every row. `mode="sft"` adds a masked copy of each row with a long
    answer, where answers are what the labels leave standing; so it works with TRL's `completion_only_loss`
    and `assistant_only_loss`, with several turns, and with rows of several documents.

    Masks depend on the seed, the epoch and the batch's content, and on nothing else: workers, resumed runs
    and ranks of tensor parallelism that hold the same rows agree without saying a word, other ranks have
    other rows. Tell the epoch (`set_epoch`, or `MEAPCallback`) where a run may see one and the same batch
    again.

    Batches for evaluation have to be clean: `eval()` switches masking off, and `MEAPTrainerMixin` or
    `MEAPCallback` do so by themselves.

    Args:
        base_collator: Makes a batch of tensors with `input_ids`; labels are made where it makes none.
        tokenizer: Says which tokens are special and which one masks.
        mask_token_id: Masks in place of the tokenizer's mask token.
        options: A `MEAPOptions`, or a mapping of its fields.
        seed: Decides the masks.
        vocab_size: Rows of the model's embedding, to refuse a mask token that has none.
        protected_ids: Further special ids: never masked, also where `protect_special` is off.
        **fields: Fields of `MEAPOptions`.

    Raises:
        InputError: no usable mask token, an unknown option or a value out of range; when called, a batch that
            can't be masked, or one with mask tokens in clean text.

    Example:
        >>> from transformers import default_data_collator
        >>> collator = DataCollatorForMEAP(default_data_collator, mask_token_id=99, mask_ratio=0.2)
        >>> batch = collator([{"input_ids": list(range(11))}])
        >>> batch["input_ids"].eq(99).sum().item(), batch["labels"].eq(99).sum().item()
        (2, 0)
    """

    def __init__(
        self,
        base_collator: Callable[..., Any],
        tokenizer: Any = None,
        *,
        mask_token_id: int | None = None,
        options: MEAPOptions | Mapping[str, Any] | None = None,
        seed: int = 0,
        vocab_size: int | None = None,
        protected_ids: Collection[int] = (),
        **fields: Any,
    ) -> None:
        if getattr(base_collator, "mlm", False):
            raise InputError(
                "base_collator masks by itself (mlm=True), and its labels are the masked tokens only; MEAP "
                "needs mlm=False"
            )
        self.base_collator, self.tokenizer = base_collator, tokenizer
        self.options = MEAPOptions.of(options, **fields)
        if self.options.add_mask_token:
            raise InputError(
                "add_mask_token changes a model: call resolve_mask_token(tokenizer, model, add_mask_token="
                "True) and give the collator its id"
            )
        if mask_token_id is None:
            if tokenizer is None:
                raise InputError("DataCollatorForMEAP needs a tokenizer or mask_token_id")
            mask_token_id = resolve_mask_token(tokenizer, token=self.options.mask_token).id
        check_mask_id(mask_token_id, tokenizer)
        if vocab_size is not None and mask_token_id >= vocab_size:
            raise InputError(
                f"mask_token_id {mask_token_id} is beyond the model's embedding of {vocab_size} rows; resize "
                "it or take a reserved token"
            )
        self.mask_token_id = mask_token_id
        self.seed, self.epoch, self.training = seed, 0, True
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_token_id = 0 if pad is None else pad
        special = set(getattr(tokenizer, "all_special_ids", ())) - {mask_token_id}
        always = {*protected_ids, *(() if pad is None else (pad,))}
        self.closing = frozenset(special | set(protected_ids))
        self.protected = frozenset(always | special if self.options.protect_special else always)
        self.protect_placeholders(tokenizer)
        self.masked: Tensor | int = 0
        self.eligible: Tensor | int = 0
        self.rows_without_labels = 0
        self._looked_through = 0
        self._told: set[str] = set()
        if self.options.ratio > MUCH:
            logger.warning("MEAP: mask_ratio %g hides more than half of the text", self.options.ratio)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A batch, masked unless `eval()` was called."""
        batch = self.clean(features, *args, **kwargs)
        if not self.training:
            return batch
        if "evaluation" not in self._told and _is_evaluation():
            self._tell(
                "evaluation",
                "MEAP: a Trainer evaluates on masked inputs; take MEAPTrainerMixin or MEAPCallback, or call "
                "collator.eval() first",
            )
        if self.options.copy_loss_weight != 1:
            self._tell(
                "weights",
                f"MEAP: copy_loss_weight {self.options.copy_loss_weight:g} is in batches as "
                f"`{copies.WEIGHTS}`, which MEAPTrainerMixin reads and no other Trainer or model does",
            )
        return self.mask(batch)

    def train(self) -> None:
        """Mask from now on."""
        self.training = True

    def eval(self) -> None:
        """Leave inputs clean from now on."""
        self.training = False

    def check_model(self, model: Any, num_rows: int) -> None:
        """Refuse a model that can't be trained on what this makes.

        Args:
            model: A causal model of transformers.
            num_rows: Rows of a batch before copies.

        Raises:
            InputError: no row for the mask token, or copies behind originals that its attention wouldn't keep
                apart.
        """
        check_mask_id(self.mask_token_id, self.tokenizer, model)
        if self.options.layout == "concat" and num_rows > 1:
            attention = model.config.get_text_config()._attn_implementation or ""
            # Its kernels look at positions that start anew only where a batch is one row.
            if "flash" in attention:
                raise InputError(
                    f"layout concat: {attention} lets copies see their originals in batches of more than one "
                    f"row, found {num_rows}; take layout `separate`, or one row at a time"
                )

    def protect_placeholders(self, source: Any) -> None:
        """Never mask where images, sound and video go, as a model's config or a tokenizer names them."""
        found = {getattr(source, name, None) for name in _PLACEHOLDERS}
        self.protected |= {id for id in found if id is not None}

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks for the same batches."""
        self.epoch = epoch

    def clean(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base collator's batch, with labels."""
        return self.labelled(dict(self.base_collator(features, *args, **kwargs)))

    def labelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with labels: the ids themselves, without padding and without the first tokens of packed
        documents, where it has none.

        Raises:
            InputError: the batch can't be masked.
        """
        ids = batch.get("input_ids")
        if ids is None and "inputs_embeds" in batch:
            raise InputError("MEAP masks tokens: the batch has only inputs_embeds, expected input_ids")
        if not isinstance(ids, Tensor):
            raise InputError(f"MEAP needs input_ids as a torch tensor, got {type(ids).__name__}")
        check_ids(ids)
        labels = batch.get("labels")
        if labels is not None and labels.shape != ids.shape:
            raise InputError(
                f"labels: expected the shape {tuple(ids.shape)} of input_ids, got {tuple(labels.shape)}"
            )
        if labels is None:
            if self.options.mode == "sft":
                raise InputError("labels: missing; mode sft tells answers by labels other than -100")
            labels = ids.masked_fill(~self._visible(batch), IGNORED)
            if (positions := batch.get("position_ids")) is not None:
                inner = torch.zeros_like(labels, dtype=torch.bool)
                inner[:, 1:] = positions.diff(dim=1) != 1
                labels = labels.masked_fill(inner & self._visible(batch), IGNORED)
            batch["labels"] = labels
        return batch

    def mask(self, batch: dict[str, Any], position: tuple[int, ...] | None = None) -> dict[str, Any]:
        """The batch with masked inputs, or with masked copies.

        Args:
            batch: Tensors on any device, with labels; left as it is.
            position: What decides the masks beside seed and content: the epoch by default. (step, micro-step)
                in a loop that knows them.
        """
        ids = batch["input_ids"]
        self._look_through(ids)
        step = position[0] if position else None
        seed = _content(ids, derive(self.seed, "meap", *(position or (self.epoch,))))
        if self.options.mode == "sft":
            if "shift_labels" in batch:
                raise InputError(
                    "mode sft makes copies of labels, and the batch has shift_labels beside them"
                )
            without = int((batch["labels"] == IGNORED).all(1).sum())
            if without:
                self.rows_without_labels += without
                self._tell("labels", f"MEAP: {without} rows of a batch have no labels and get no copy")
            hidden = answers.masked_answers(batch, self.options, seed, self.closing, self.protected)
            self._count(hidden, batch["labels"] != IGNORED)
            return copies.with_copies(batch, hidden, self.mask_token_id, self.options, self.pad_token_id)
        options, allowed = self.options, self._visible(batch)
        if self.protected:
            allowed = allowed & ~is_any(ids, self.protected)
        if options.seed_cycle is not None:
            if step is None:
                raise InputError(
                    "seed_cycle goes by steps: it needs MEAPTrainerMixin or mask(batch, (step,))"
                )
            mask = torch.zeros_like(allowed)
            mask[:, authors_places(step, ids.shape[1], options.ratio, options.seed_cycle)] = True
            mask &= allowed
            masked = torch.where(mask, self.mask_token_id, ids)
        else:
            masked, mask = meap_mask_inputs(
                ids,
                self.mask_token_id,
                options.ratio,
                allowed,
                exclude_last=options.exclude_last,
                seed=seed,
                per_row=options.per_row,
                exact_count=options.exact_count,
                return_mask=True,
            )
        self._count(mask, allowed)
        return {**batch, "input_ids": masked}

    def fraction(self) -> float:
        """Share of the tokens seen since the last call that were masked."""
        masked, eligible = int(self.masked), int(self.eligible)
        self.masked = self.eligible = 0
        return masked / max(1, eligible)

    def _count(self, mask: Tensor, allowed: Tensor) -> None:
        self.masked, self.eligible = self.masked + _number(mask), self.eligible + _number(allowed)

    def _visible(self, batch: dict[str, Any]) -> Tensor:
        """Where there is no padding."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            return mask.bool()
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None or pad == self.tokenizer.eos_token_id:  # an end token may be an end
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad

    def _look_through(self, ids: Tensor) -> None:
        if self._looked_through >= LOOKED_THROUGH:
            return
        self._looked_through += 1
        found = ids == self.mask_token_id
        if found.any():
            row = int(found.any(-1).nonzero()[0, 0])
            raise in_clean_text(self.mask_token_id, int(found.sum()), row)

    def _tell(self, what: str, words: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(words)


def _content(ids: Tensor, seed: int) -> Tensor:
    """A seed of a batch's content, 0-d int64 on its device: a multilinear hash, so nothing leaves a GPU."""
    weights_B, weights_T = (
        _factors(size, row, ids.device) for row, size in ((1, len(ids)), (0, ids.shape[1]))
    )
    row_B = mixed((ids * weights_T).sum(1) if ids.is_cuda else torch.mv(ids.long(), weights_T))
    return mixed((row_B * weights_B).sum() + signed(seed))


@functools.lru_cache(maxsize=32)
def _factors(count: int, seed: int, device: torch.device) -> Tensor:
    """What entries count in the hash, int64."""
    return position_keys(torch.Size((1, count)), seed, True, device)[0]


def _number(flags: Tensor) -> Tensor | int:
    """How many are True; stays on a GPU until somebody asks."""
    return int(np.count_nonzero(flags.numpy())) if flags.device.type == "cpu" else flags.sum()


def _is_evaluation() -> bool:
    """Whether a Trainer of transformers is evaluating further up the stack; one can't tell by the batch."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "evaluation_loop" and "transformers" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
