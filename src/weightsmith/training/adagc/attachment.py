"""Clipping tied to an optimiser: it runs before every step, and its state travels in the optimiser's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.errors import InputError

if TYPE_CHECKING:
    from weightsmith.training.adagc.clipper import AdaGC

logger = logging.getLogger(__name__)

STATE_KEY = "adagc"
"""Where an optimiser's state dict holds the clipper's. Not inside `state[p]`: `load_state_dict` would cast it
to the parameter's dtype, and Adam takes a parameter with any state for one with all of it."""


class Attachment:
    """A clipper tied to an optimiser; `remove()` unties it, as does the end of a `with` block.

    Raises:
        InputError: the optimiser has a clipper already, or is no `torch.optim.Optimizer`.
    """

    def __init__(self, clip: AdaGC, optimizer: torch.optim.Optimizer):
        # accelerate's wrapper calls the wrapped optimiser's step, whose hooks run.
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # pyrefly: ignore
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(f"AdaGC.attach: needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        others = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in others):
            raise InputError("AdaGC.attach: this optimiser has an AdaGC already; remove() that one first")
        self.clip = clip
        self._known = _count(optimizer)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        )

    def remove(self) -> None:
        """Detach from the optimiser; the clipper keeps its state."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise InputError(
                "AdaGC is attached: step(closure) would compute gradients after the clipping; "
                "run forward and backward first and call step() without a closure"
            )
        if _count(optimizer) > self._known:
            self._known = _count(optimizer)
            self.clip.add_new(optimizer.param_groups)
        # A fused optimiser divides by the loss scale itself, inside its kernel.
        self.clip.step(
            grad_scale=getattr(optimizer, "grad_scale", None), found_inf=getattr(optimizer, "found_inf", None)
        )

    def _save(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return with_clipper(state, self.clip)

    def _load(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return without_clipper(state, self.clip)


def with_clipper(state: Mapping[str, Any], clip: AdaGC) -> dict[str, Any]:
    """An optimiser's state dict with the clipper's state in its first group."""
    first, *others = state["param_groups"]
    return {**state, "param_groups": [{**first, STATE_KEY: clip.state_dict()}, *others]}


def without_clipper(state: Mapping[str, Any], clip: AdaGC) -> dict[str, Any]:
    """An optimiser's state dict without the clipper's state, which `clip` has taken over.

    Raises:
        InputError: that state is of other tensors.
    """
    saved = [group[STATE_KEY] for group in state["param_groups"] if STATE_KEY in group]
    if saved:
        clip.load_state_dict(saved[0])
    else:
        logger.warning("AdaGC: the optimiser's saved state has none of the clipper's; clipping starts fresh")
    groups = [{k: v for k, v in group.items() if k != STATE_KEY} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
