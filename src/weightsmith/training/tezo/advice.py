"""What a run of steps without gradients is told once: settings that do nothing, or not what was meant."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from weightsmith.training.tezo.sweeps import Member

logger = logging.getLogger(__name__)

_NOTHING_MOVED = 10
"""Steps in a row whose probes agree to the bit, after which rho must be too small."""


class Advice:
    """Warnings of one optimiser, each told once.

    Args:
        name: The optimiser's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: set[str] = set()
        self._still = 0

    def tell(self, what: str, words: str) -> None:
        """Log a warning, unless one of its kind was."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s: %s (told once)", self._name, words)

    def on_difference(self, difference: float, rho: float) -> None:
        """Warn where probes of many steps differed by nothing."""
        self._still = self._still + 1 if difference == 0 else 0
        if self._still == _NOTHING_MOVED:
            self.tell(
                "still",
                f"the two losses were the same to the bit for {_NOTHING_MOVED} steps; try rho={10 * rho:g}",
            )

    def on_rho(self, members: Iterable[Member]) -> None:
        """Warn where a probe is smaller than what the weights' dtype can tell apart."""
        for piece, group, _ in members:
            if not piece.value.numel():
                continue
            dtype = piece.value.dtype
            norm = torch.linalg.vector_norm(piece.value, dtype=torch.promote_types(dtype, torch.float32))
            size = float(norm) / piece.value.numel() ** 0.5
            least = torch.finfo(dtype).eps * size / piece.spread
            if group["rho"] < least:
                wider = ", or float32 weights" if dtype.itemsize < 4 else ""
                self.tell(
                    "rho",
                    f"rho={group['rho']:g} is lost in the rounding of {piece.name} ({dtype}, "
                    f"about {size:.2g}); try rho={least:.1g}{wider}",
                )
                return

    def on_dropout(self, model: Any) -> None:
        """Warn where a model in training mode hides other parts of itself in each step."""
        if model is None:
            return
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                self.tell(
                    "dropout",
                    f"{name} drops out: both probes of a step drop the same with replay_rng, and steps "
                    "differ by what they drop; call model.eval() to compare the whole model",
                )
                return
