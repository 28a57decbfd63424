"""What a model is called with: mappings of keyword arguments, tuples of positional ones, or one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.errors import InputError

Batch = Any


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch; a language model keeps no cache."""
    if isinstance(batch, Mapping):
        given = {str(name): value for name, value in batch.items()}
        if hasattr(model, "config") and hasattr(model, "generate"):
            given.setdefault("use_cache", False)
        return model(**given)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """All tensors of a batch on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, device) for value in batch]
    return batch


def causal_loss(model: nn.Module, batch: Batch) -> Any:
    """The loss that a Hugging Face model says; labels are the inputs, without padding, where there are none.

    Raises:
        InputError: the batch is no mapping, or the model says no loss.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a model that says its loss takes mappings, got a {type(batch).__name__}; give a "
            "loss_fn(model, batch)"
        )
    given = dict(batch)
    if "labels" not in given and "input_ids" in given:
        labels = given["input_ids"]
        mask = given.get("attention_mask")
        given["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    loss = getattr(call(model, given), "loss", None)
    if loss is None:
        raise InputError("the model says no loss for this batch; give a loss_fn(model, batch)")
    return loss


def batch_key(batch: Batch) -> str:
    """Stands for the content of a batch.

    Raises:
        InputError: a part of it is of a type whose content can't be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    for piece in _pieces(batch):
        if isinstance(piece, type):
            raise InputError(
                f"reference: cached: batches are known by their content, that of a {piece.__name__} can't be "
                "read; make them of tensors, arrays, numbers and strings, or set `reference: online`"
            )
        digest.update(piece)
    return digest.hexdigest()


def data_digest(batches: Iterable[Batch]) -> str:
    """Stands for the content and the order of all batches; of what can't be read, for the type alone.

    Raises:
        InputError: there are none, or they can be gone through only once.
    """
    if isinstance(batches, Iterator):
        raise InputError(
            f"batches are gone through again and again, a {type(batches).__name__} gives them once; give a "
            "DataLoader or a list"
        )
    digest, count = hashlib.blake2b(digest_size=12), 0
    for batch in batches:
        count += 1
        for piece in _pieces(batch):
            digest.update(piece.__name__.encode() if isinstance(piece, type) else piece)
    if not count:
        raise InputError("no batches: give a DataLoader or a list")
    return f"{count} {'batch' if count == 1 else 'batches'} {digest.hexdigest()}"


def _pieces(value: Any) -> Iterator[Any]:
    """The content of a batch as bytes; in place of what can't be read its type.

    Lengths and types come first, so that no two batches have the same bytes.
    """
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)} ".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"array {value.dtype} {value.shape} ".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for name in sorted(value):
            yield f"{name!r} ".encode()
            yield from _pieces(value[name])
    elif isinstance(value, tuple | list):
        yield f"sequence {len(value)} ".encode()
        for part in value:
            yield from _pieces(part)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__} {value!r} ".encode()
    else:
        yield type(value)
