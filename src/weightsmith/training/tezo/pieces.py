"""One parameter's directions and what a variant makes of them.

    CPPiece     TeZO   Z = U diag(tau) V^T, only tau is drawn in each step           `low_rank.py`
    LazyPiece   LOZO   Z = U V^T, U drawn in each step, V every so many              `low_rank.py`
    DensePiece  MeZO   Z a Gaussian number for every weight; and what has fewer than two axes in the others

Each can add a multiple of its direction to the weights, and can make its step, from weights at which a
multiple of the direction is still to be added (the undoing of the last probe): both in one pass over them.
No temporary has more than a block of numbers, apart from factors. A pass that breaks off between two blocks
(where memory runs out) leaves none of them at a probe that nobody knows of.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from traceback import clear_frames
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.training.sharded import local
from weightsmith.training.tezo.noise import generator
from weightsmith.training.tezo.options import ZerothOrderOptions
from weightsmith.training.tezo.shares import Share, whole_shape

BLOCK = 1 << 18
"""Numbers of a temporary on a CPU: small enough to stay in its cache."""
DEVICE_BLOCK = 1 << 24
"""The same on an accelerator, where each block costs launches."""


class Step(NamedTuple):
    """What an update is made of.

    Attributes:
        number: The step, which decides the direction.
        kappa: Derivative along the direction.
        lr: Learning rate.
        decay: Share of the weights that is taken off first.
        undo: Multiple of the direction that has to be added to be at the weights again.
    """

    number: int
    kappa: float
    lr: float
    decay: float = 0.0
    undo: float = 0.0


class Piece:
    """What all three have.

    Args:
        name: The parameter's.
        value: Its values, sharing memory.
        state: Its entry of the optimiser's state; what is missing is made on first use.
        options: The optimiser's.
        seed: Of its directions.
        share: Which rows `value` is, where other processes hold others.

    Attributes:
        offset: Multiple of the step's direction by which a probe has moved the weights.
        done: Blocks that the present pass is through with.
        spread: Root mean square of a direction's numbers.
    """

    spread = 1.0

    def __init__(
        self,
        name: str,
        value: Tensor,
        state: dict[str, Any],
        options: ZerothOrderOptions,
        seed: int,
        share: Share | None = None,
    ) -> None:
        self.name, self.value, self.state, self.options, self.seed = name, value, state, options, seed
        self.share = share
        self.offset = 0.0
        self.done = 0
        # Running sums lose small terms in 16 bits.
        self.wide = torch.float32 if value.dtype.itemsize < 4 else value.dtype

    def move(self, step: int, amount: float) -> None:
        """Add `amount` times the step's direction to the weights; after an exception to none of them."""
        self.done = 0
        try:
            self._move(step, amount)
        except BaseException as broken:
            clear_frames(broken.__traceback__)  # whose blocks the way back needs room for
            if self.done:
                self._move(step, -amount, last=self.done)
            raise

    def update(self, step: Step) -> None:
        """One step of the variant. After an exception the probe is undone everywhere, and the blocks before
        it have made their step.
        """
        self.done = 0
        try:
            self._update(step)
        except BaseException as broken:
            clear_frames(broken.__traceback__)
            if step.undo:
                self._move(step.number, step.undo, first=self.done)
            self.offset = 0.0
            raise
        self.offset = 0.0

    def _move(self, step: int, amount: float, first: int = 0, last: int | None = None) -> None:
        """Add to the blocks `first` .. `last` - 1; count in `done` those that are through."""
        raise NotImplementedError

    def _update(self, step: Step) -> None:
        """The step; counts in `done` the blocks whose probe is undone."""
        raise NotImplementedError

    def direction(self, step: int) -> Tensor:
        """The step's direction as one tensor, shaped like `value`; no step ever makes it."""
        raise NotImplementedError

    @property
    def whole_shape(self) -> torch.Size:
        """Shape of `value` with the rows of all processes."""
        return whole_shape(self.value, self.share)

    def running(self, shape: torch.Size, share: Share | None = None) -> list[Tensor]:
        """Running mean and square, as far as the variant has them; zeros on first use. With a share they are
        kept as sharded tensors, so that a checkpoint knows whose rows they are.
        """
        names = {"sgd": (), "adam": ("mean", "square")}.get(self.options.variant, ("mean",))
        for name in names:
            if name not in self.state:
                # State outlives the call, which may be in inference mode.
                with torch.inference_mode(False):
                    made = torch.zeros(shape, dtype=self.wide, device=self.value.device)
                    self.state[name] = made if share is None else share.wrapped(made)
        return [local(self.state[name]) for name in names]

    def count(self) -> tuple[float, float]:
        """Count an update of `adam`; what its mean and square lack of a whole average."""
        self.state["updates"] = count = self.state.get("updates", 0) + 1
        if not self.options.bias_correction:
            return 1.0, 1.0
        return 1 - self.options.betas[0] ** count, 1 - self.options.betas[1] ** count

    def along(self, gradient: Tensor, running: list[Tensor]) -> Tensor:
        """Take a gradient into running means; returns what the step goes along."""
        beta1, beta2 = self.options.betas
        if not running:
            return gradient
        if self.options.variant == "lion":
            mixed = torch.lerp(gradient, running[0], beta1)
            running[0].lerp_(gradient, 1 - beta2)
            return mixed
        running[0].lerp_(gradient, 1 - beta1)
        if self.options.variant == "adam":
            running[1].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return running[0]


class DensePiece(Piece):
    """A Gaussian number for every weight, drawn block by block wherever it is needed."""

    def _move(self, step: int, amount: float, first: int = 0, last: int | None = None) -> None:
        for weights, noise, _ in islice(self._blocks(step), first, last):
            weights.add_(noise, alpha=amount)
            self.done += 1

    def _update(self, step: Step) -> None:
        running, variant = self.running(self.value.shape, self.share), self.options.variant
        lacking = self.count() if variant == "adam" else (1.0, 1.0)
        for weights, noise, part in self._blocks(step.number):
            if variant == "sgd" and not step.decay:
                weights.add_(noise, alpha=step.undo - step.lr * step.kappa)
                self.done += 1
                continue
            if step.undo:
                weights.add_(noise, alpha=step.undo)
            self.done += 1
            if step.decay:
                weights.mul_(1 - step.decay)
            gradient = noise.to(self.wide).mul_(step.kappa)
            chosen = [each if part is None else each.view(-1)[part] for each in running]
            along = self.along(gradient, chosen)
            if variant == "adam":
                root = torch.sqrt(chosen[1], out=gradient)
                root.mul_(lacking[1] ** -0.5).add_(self.options.eps)
                add_quotient(weights, along, root, -step.lr / lacking[0])
            else:
                weights.add_(along.sign() if variant == "lion" else along, alpha=-step.lr)

    def direction(self, step: int) -> Tensor:
        """The step's direction as one tensor, shaped like `value`."""
        whole = torch.empty_like(self.value)
        for _, noise, part in self._blocks(step):
            (whole if part is None else whole.view(-1)[part]).copy_(noise)
        return whole

    def _blocks(self, step: int) -> Iterator[tuple[Tensor, Tensor, slice | None]]:
        """Blocks of the weights, the noise of each (good until the next), and where it lies."""
        value = self.value
        random = generator(value.device, "dense", self.seed, self.name, step)
        if not value.is_contiguous():
            noise = torch.empty(value.shape, dtype=torch.float32, device=value.device)
            yield value, noise.normal_(generator=random), None
            return
        flat, size, here = value.view(-1), block_size(value.device), value.numel()
        first, total = 0, here
        if self.share is not None:  # numbers of the rows before are drawn and not used
            whole = self.share.parameter.shape
            total = whole.numel()
            first = self.share.rows.start * (total // whole[0])
        noise = torch.empty(min(size, total), dtype=torch.float32, device=value.device)
        for start in range(0, min(total, first + here), size):
            drawn = noise[: min(size, total - start)].normal_(generator=random)
            part = slice(max(start - first, 0), min(start + size - first, here))
            if part.start < part.stop:
                at = first + part.start - start
                yield flat[part], drawn[at : at + part.stop - part.start], part


def block_size(device: torch.device) -> int:
    """Numbers of a temporary."""
    return BLOCK if device.type == "cpu" else DEVICE_BLOCK


def add_quotient(weights: Tensor, above: Tensor, below: Tensor, rate: float) -> None:
    """Add `rate` * above / below: rounded once, where the weights are 16 bits. `below` is used up."""
    if weights.dtype == above.dtype:
        weights.addcdiv_(above, below, value=rate)
    else:
        weights.add_(torch.div(above, below, out=below), alpha=rate)
