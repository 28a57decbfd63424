"""Masked copies of rows behind their originals, and losses in which copies count otherwise.

Letters  B rows, T tokens of a row, V tokens of the vocabulary
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.encoding import IGNORED
from weightsmith.training.meap.answers import document_starts
from weightsmith.training.meap.options import MEAPOptions

WEIGHTS = "loss_weights"
"""Key of a batch that says what each label counts, where copies count otherwise than originals."""
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_NOT_BY_TOKEN = (*_LENGTHS, "max_length_q", "max_length_k", "num_items_in_batch")


def with_copies(
    batch: dict[str, Any], masked: Tensor, mask_token_id: int, options: MEAPOptions, pad_token_id: int
) -> dict[str, Any]:
    """The batch with a masked copy of each row, or of each document, that has something to hide.

    Args:
        batch: What a collator made, with labels.
        masked: Bool (B, T): what the copies hide.
        mask_token_id: By what.
        options: The layout, and what a copy's labels count.
        pad_token_id: Fills rows up where originals and copies share one.

    Raises:
        InputError: an entry of the batch that belongs to rows or tokens in no known way.
    """
    batch = dict(batch)
    if not masked.any():
        if options.copy_loss_weight != 1:
            batch[WEIGHTS] = torch.ones_like(batch["labels"], dtype=torch.float32)
        return batch
    masked = masked.to(batch["labels"].device)
    hidden = {
        "input_ids": torch.where(masked, mask_token_id, batch["input_ids"]),
        "labels": torch.where(masked, batch["labels"], IGNORED),
    }
    if options.copy_loss_weight != 1:
        batch[WEIGHTS] = torch.ones_like(batch["labels"], dtype=torch.float32)
        hidden[WEIGHTS] = torch.full_like(batch[WEIGHTS], options.copy_loss_weight)
    if options.layout != "separate":
        return _behind(batch, hidden, masked, pad_token_id, visible=options.layout == "concat_visible")
    if is_flat(batch):
        return _as_documents(batch, hidden, masked)
    return _as_rows(batch, hidden, masked)


def is_flat(batch: dict[str, Any]) -> bool:
    """Whether the batch is one row of documents, told apart by positions or lengths and not by padding."""
    if "cu_seq_lens_q" in batch:
        return True
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or batch["labels"].shape[0] != 1:
        return False
    if isinstance(mask, Tensor) and not mask.bool().all():
        return False  # positions of padding start anew too
    return bool(document_starts(positions.shape, positions).sum() > 1)


def _as_rows(batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor) -> dict[str, Any]:
    rows = masked.any(1).nonzero().flatten()
    number = masked.shape[0]
    made = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or key in _NOT_BY_TOKEN:
            made[key] = value
        elif value.shape[0] == number:
            made[key] = torch.cat([value, hidden.get(key, value)[rows]])
        else:
            raise InputError(
                f"MEAP copies rows, but `{key}` has {value.shape[0]} entries for {number} rows; take it out "
                "of the batch, or use mode `pretrain`"
            )
    return made


def _as_documents(batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor) -> dict[str, Any]:
    length = masked.shape[1]
    if "cu_seq_lens_q" in batch:
        edges = batch["cu_seq_lens_q"].tolist()
    else:
        edges = [*np.flatnonzero(document_starts(masked.shape, batch["position_ids"])[0]).tolist(), length]
    spans = list(itertools.pairwise(edges))
    copied = [(start, stop) for start, stop in spans if masked[0, start:stop].any()]
    taken = torch.cat([torch.arange(start, stop) for start, stop in copied]).to(masked.device)
    made = {}
    for key, value in batch.items():
        if key in _LENGTHS:
            further = torch.tensor([stop - start for start, stop in copied], device=value.device).cumsum(0)
            made[key] = torch.cat([value, (value[-1] + further).to(value.dtype)])
        elif not isinstance(value, Tensor) or key in _NOT_BY_TOKEN:
            made[key] = value
        elif value.ndim >= 2 and value.shape[:2] == (1, length):
            more = hidden.get(key, value)[:, taken]
            if key == "seq_idx":
                sizes = torch.tensor([stop - start for start, stop in copied])
                numbers = torch.arange(len(copied)).repeat_interleave(sizes).to(value)
                more = (value.max() + 1 + numbers)[None].to(value.dtype)
            made[key] = torch.cat([value, more], dim=1)
        else:
            raise InputError(
                f"MEAP copies documents, but `{key}` of shape {tuple(value.shape)} doesn't belong to the "
                f"{length} tokens of the row; take it out of the batch, or use mode `pretrain`"
            )
    return made


def _behind(
    batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor, pad_token_id: int, *, visible: bool
) -> dict[str, Any]:
    """Rows `original, copy, padding`. Models keep documents apart by positions that start anew, as they do in
    packed rows, as long as there is no attention mask.
    """
    number, length = masked.shape
    strange = [
        key
        for key, value in batch.items()
        if key in _NOT_BY_TOKEN or not isinstance(value, Tensor) or value.shape != (number, length)
    ]
    if strange:
        raise InputError(
            f"layout concat: `{strange[0]}` doesn't belong to the {number} rows of {length} tokens; take "
            "layout `separate`"
        )
    real = batch.get("attention_mask", torch.ones_like(masked)).bool()
    positions = batch.get("position_ids", real.long().cumsum(1) - 1)
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    lines: dict[str, list[Tensor]] = {}
    for row in range(number):
        twice = bool(masked[row].any())
        for key, value in {**batch, "position_ids": positions}.items():
            if key == "attention_mask":
                continue
            own = value[row][real[row]]
            copy = hidden.get(key, value)[row][real[row]]
            lines.setdefault(key, []).append(torch.cat([own, copy]) if twice else own)
    width = max(len(line) for line in lines["input_ids"])
    # A cache of keys and values, which models make unasked, would keep them from looking at positions.
    made: dict[str, Any] = {"use_cache": False}
    for key, listed in lines.items():
        filled = [
            torch.cat(
                [
                    line,
                    # Padding is a document of its own, behind everything that counts.
                    torch.arange(width - len(line)).to(line)
                    if key == "position_ids"
                    else line.new_full((width - len(line),), fill.get(key, 0)),
                ]
            )
            for line in listed
        ]
        made[key] = torch.stack(filled)
    if visible:
        del made["position_ids"]
        sizes = torch.tensor([len(line) for line in lines["input_ids"]])
        mask = torch.arange(width) < sizes[:, None]
        made["attention_mask"] = mask.long().to(masked.device)
    return made


@contextlib.contextmanager
def weighing(network: Any, weights: Tensor) -> Iterator[None]:
    """Within, label i counts `weights[i]` wherever the network takes its loss: also where it takes one at
    several depths, and whatever it adds to it stays.

    Args:
        network: A causal model of transformers with the usual `loss_function`.
        weights: (B, T), for the labels of the batch that it is called on.

    Raises:
        InputError: the network's loss is that of other labels, or none by `loss_function`.
    """
    usual, name = network.loss_function, type(network).__name__
    is_taken = False

    def loss(
        logits: Tensor, labels: Tensor | None, *_: Any, num_items_in_batch: Any = None, **__: Any
    ) -> Tensor:
        nonlocal is_taken
        if labels is None or labels.shape != weights.shape:
            found = "none" if labels is None else tuple(labels.shape)
            raise InputError(
                f"copy_loss_weight: {name} takes its loss of labels of shape {found}, expected "
                f"{tuple(weights.shape)}: all of a batch on one device"
            )
        is_taken = True
        return weighted_loss(logits, labels, weights, num_items_in_batch)

    network.loss_function = loss
    try:
        yield
    finally:
        network.loss_function = usual
    if not is_taken:
        raise InputError(
            "copy_loss_weight other than 1 weighs labels in a model's loss_function, which "
            f"{name} didn't call"
        )


def weighted_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, total: Tensor | float | None = None
) -> Tensor:
    """Next-token cross-entropy in which label i counts `weights[i]`.

    Args:
        logits: (B, T, V).
        labels: (B, T), as a causal model of transformers takes them: label i is predicted at i - 1.
        weights: (B, T).
        total: What to divide by; by default the sum of the weights of all labels.
    """
    targets = labels[:, 1:].to(logits.device)
    weights = weights[:, 1:].to(logits.device) * (targets != IGNORED)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    total = weights.sum() if total is None else torch.as_tensor(total, device=logits.device)
    return (losses * weights.flatten()).sum() / total
