"""A step of the preheat: from batches, or from a function of the user's. Its loss is one number."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.hrp.preheat import Step

log = logging.getLogger(__name__)

TrainStep = Callable[[nn.Module, int], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model tells of a batch, moved to its device: `model(**batch).loss`.

    Raises:
        InputError: the batch has no names, or the model tells no loss of it.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"dataloader: a batch is a {type(batch).__name__}, expected a mapping of names to tensors, or a "
            "forward_fn that gives the loss"
        )
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    found = model(**moved)
    loss = found if isinstance(found, Tensor) else getattr(found, "loss", None)
    if loss is None:
        raise InputError(
            f"{type(model).__name__} tells no loss of a batch with {', '.join(batch)}: expected labels, or a "
            "forward_fn that gives the loss"
        )
    return loss


def step_of(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    train_step: TrainStep | None,
    forward_fn: Callable[[nn.Module, Any], Tensor],
    steps: int,
) -> Step:
    """Forward and backward of one step.

    Raises:
        InputError: no data or two kinds of it, or a `train_step` that doesn't take model and step; later, by
            the step: data that can't go on, a loss that has no backward pass.
    """
    if (dataloader is None) == (train_step is None):
        found = "none" if dataloader is None else "both"
        raise InputError(
            f"HRP needs one of dataloader, train_step and hrp_state_dict, found {found} of the first two"
        )
    if train_step is not None:
        _check_takes_two(train_step)
        return lambda number: _backward("train_step", train_step(model, number))
    assert dataloader is not None
    batches = endless(dataloader, steps)
    return lambda number: _backward("forward_fn", forward_fn(model, next(batches)))


def endless(dataloader: Iterable[Any], wanted: int) -> Iterator[Any]:
    """Batches, again from the start where they end.

    Args:
        dataloader: Gives them.
        wanted: How many will be read; for messages.

    Raises:
        InputError: there are none, or what gives them can be read only once.
    """
    count = told = 0
    while True:
        before = count
        for batch in dataloader:
            count += 1
            yield batch
        if count == before:
            if count:
                raise InputError(
                    f"dataloader ended after {count} of the preheat's {wanted} batches and can't be read "
                    "again"
                )
            raise InputError("dataloader is empty: the preheat has nothing to learn from")
        if not told:
            log.warning(
                "HRP: the data ended after %d of the preheat's %d batches and is read again", count, wanted
            )
        told = 1


def _check_takes_two(train_step: TrainStep) -> None:
    try:
        signature = inspect.signature(train_step)
    except (TypeError, ValueError):  # some callables written in C tell none
        return
    try:
        signature.bind(None, 0)
    except TypeError as wrong:
        raise InputError(
            f"train_step takes {signature}, expected (model, step): the model and the number of the step"
        ) from wrong


def _backward(giver: str, loss: Any) -> float:
    """The backward pass of a step, and its loss."""
    if not isinstance(loss, Tensor):
        raise InputError(
            f"{giver} gave {'None' if loss is None else type(loss).__name__}, expected the loss as a tensor; "
            "HRP itself runs its backward pass"
        )
    if loss.numel() != 1:
        raise InputError(f"{giver} gave a loss of shape {tuple(loss.shape)}, expected one number")
    if not loss.requires_grad:
        raise InputError(
            f"{giver} gave a loss without a gradient, expected one that depends on the adapter and isn't "
            "detached"
        )
    loss.backward()
    return float(loss.detach())
