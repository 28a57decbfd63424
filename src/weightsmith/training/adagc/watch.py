"""Gradients that are not finite: counted on the device, reported once, an error when they don't stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weightsmith.errors import WeightsmithError
from weightsmith.training.adagc.options import AdaGCOptions

logger = logging.getLogger(__name__)


class NonFiniteGradientError(WeightsmithError, ArithmeticError):
    """Gradients hold NaN or infinity: on one step under `nonfinite="error"`, else on too many in a row."""


class Watch:
    """Counts, for each slot, the steps in a row whose gradient was not finite.

    On a CPU every step is judged at once. On an accelerator the worst count is copied to the host behind the
    computation and judged by whichever later step finds the copy finished, so no step ever waits; only
    `nonfinite="error"` has to.
    """

    def __init__(
        self, names: Callable[[], Sequence[str]], options: AdaGCOptions, num_slots: int, device: torch.device
    ):
        self._names = names
        self._options = options
        self._row_S = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._steps = 0
        self._warned = False
        self._host = torch.zeros((), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._arrival: torch.Event | None = None

    def look(self, bad_S: Tensor) -> None:
        """Take note of one step.

        Args:
            bad_S: Whether each norm is NaN or infinite, (S,) bool.

        Raises:
            NonFiniteGradientError: the policy says so; names tensors, step and count.
        """
        self._steps += 1
        if self._options.nonfinite == "error" and bool(bad_S.any()):
            raise NonFiniteGradientError(
                f"AdaGC: step {self._steps}: gradient of {self._listed(bad_S)} not finite; nothing changed"
            )
        self._row_S.add_(1).mul_(bad_S)
        worst = self._row_S.max()
        if worst.device.type == "cpu":
            self._judge(int(worst))
        elif self._arrival is None:
            self._host.copy_(worst, non_blocking=True)
            self._arrival = torch.Event(device=worst.device)
            self._arrival.record()
        elif self._arrival.query():
            self._arrival = None
            self._judge(int(self._host))

    def _judge(self, worst: int) -> None:
        if worst == 0:
            return
        if worst >= self._options.max_consecutive_nonfinite:
            stuck_S = self._row_S >= self._options.max_consecutive_nonfinite
            raise NonFiniteGradientError(
                f"AdaGC: not finite for {worst} steps in a row (step {self._steps}): the gradient of "
                f"{self._listed(stuck_S)}; lower the learning rate, or look at the data and the loss"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "AdaGC: step %d: not finite, becomes zero: the gradient of %s; later ones are only counted",
                self._steps,
                self._listed(self._row_S > 0),
            )

    def _listed(self, which_S: Tensor) -> str:
        names = [name for name, hit in zip(self._names(), which_S.tolist(), strict=True) if hit]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
