"""What a run of steps without gradients is told once: settings that do nothing, or not what was meant."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

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
            if piece.value.dtype.itemsize >= 4 or not piece.value.numel():
                continue
            size = float(piece.value.float().square().mean().sqrt())
            least = torch.finfo(piece.value.dtype).eps * size
            if group["rho"] < least:
                self.tell(
                    "rho",
                    f"rho={group['rho']:g} is lost in the rounding of {piece.name} ({piece.value.dtype}, "
                    f"about {size:.2g}); try rho={least:.1g}, or float32 weights",
                )
                return
