"""Sweeps that move the weights to a probe, back, and along a step, from wherever they were left."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.tezo.branch import Branches
from weightsmith.training.tezo.low_rank import LowRankPiece
from weightsmith.training.tezo.options import ZerothOrderOptions
from weightsmith.training.tezo.pieces import Piece, Step

Member = tuple[Piece, dict[str, Any], Tensor]
"""A piece with its parameter group and its parameter."""


class Sweeps:
    """Where the weights are, and the ways between their places.

    Args:
        members: All that moves.
        options: The optimiser's: how weights come back, and the bound of a step's derivative.
        model: Where `branch` finds the modules of matrices.

    Attributes:
        members: As given.
    """

    def __init__(
        self, members: Sequence[Member], options: ZerothOrderOptions, model: nn.Module | None
    ) -> None:
        self.members, self._restore, self._model = members, options.restore, model
        self._bound = options.clip or math.inf
        self._copies: dict[int, Tensor] = {}
        self._branches: Branches | None = None

    @property
    def is_away(self) -> bool:
        """Whether any weight is not where the last step has left it."""
        return bool(self._copies) or any(piece.offset for piece, _, _ in self.members)

    def go(self, step: int, target: int) -> None:
        """Move the weights to `target` times rho times the direction of a step.

        Raises:
            InputError: `branch` without a model.
        """
        if not (target or self.is_away):
            return
        copies = self._restore != "inplace"
        branches = self._branched() if self._restore == "branch" else None
        with uninterrupted():
            for piece, group, parameter in self.members:
                amount, key = target * group["rho"], id(parameter)
                if branches is not None and branches.holds(parameter):
                    assert isinstance(piece, LowRankPiece)
                    branches.put(parameter, piece.product(step, amount) if target else None)
                elif copies and not target:
                    if key in self._copies:  # not where a sweep broke off before it came here
                        parameter.detach().copy_(self._copies[key])
                        del self._copies[key]
                elif amount != piece.offset:
                    if copies and key not in self._copies:
                        self._copies[key] = parameter.detach().clone()
                    piece.move(step, amount - piece.offset)
                piece.offset = amount

    def update(self, step: int, difference: float, maximize: bool) -> None:
        """The step, from wherever the weights are.

        Args:
            step: Its number, which decides the direction.
            difference: Of the two probes' losses.
            maximize: Climb instead of descend.
        """
        if self._restore != "inplace":
            self.go(step, 0)
        sign = -1.0 if maximize else 1.0
        for piece, group, parameter in self.members:
            kappa = difference / (2 * group["rho"])
            decays = group["weight_decay"] and parameter.ndim >= 2
            piece.update(
                Step(
                    number=step,
                    kappa=sign * min(max(kappa, -self._bound), self._bound),
                    lr=float(group["lr"]),
                    decay=float(group["lr"]) * group["weight_decay"] if decays else 0.0,
                    undo=-piece.offset,
                )
            )

    def is_branched(self, parameter: Tensor) -> bool:
        """Whether probes leave this parameter alone and add to what its modules return."""
        return self._restore == "branch" and self._branched().holds(parameter)

    def probe(self) -> AbstractContextManager[None]:
        """What a forward pass of a probe has to run in."""
        return nullcontext() if self._branches is None else self._branches.probe()

    def release(self, step: int) -> list[str]:
        """After the first probe: names of matrices whose perturbation it has missed. The weights are back
        then, and these are copied and moved from now on.
        """
        missing = set() if self._branches is None else self._branches.missing()
        if self._branches is not None and missing:
            self.go(step, 0)
            self._branches.release(missing)
        return [piece.name for piece, _, parameter in self.members if id(parameter) in missing]

    def _branched(self) -> Branches:
        if self._branches is None:
            if self._model is None:
                raise InputError('restore="branch" adds to what modules return: give it `model=model`')
            simple = [p for piece, _, p in self.members if isinstance(piece, LowRankPiece) and p.ndim == 2]
            self._branches = Branches(self._model, simple)
        return self._branches


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until what is within is done: between a piece's move and the note of it nobody could
    tell where the piece is.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *caught: held.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
