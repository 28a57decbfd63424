"""Directions of matrices that are products of two factors: TeZO's, which stay, and LOZO's, half of which do.

Letters  E stacked matrices (1 as a rule), M rows, N columns, R rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from weightsmith.training.tezo.noise import generator
from weightsmith.training.tezo.options import LOZOOptions, TeZOOptions
from weightsmith.training.tezo.pieces import Piece, Step, add_quotient, block_size
from weightsmith.training.tezo.shares import Share


class LowRankPiece(Piece):
    """Matrices whose directions are a product of two factors.

    Args:
        name: The parameter's.
        matrices: (E, M, N), sharing its memory.
        state: Its entry of the optimiser's state.
        options: The optimiser's.
        seed: Of its directions.
        rank: Of each direction, at most the smaller side.
        share: Which rows `matrices` are, where other processes hold others.
    """

    def __init__(
        self,
        name: str,
        matrices: Tensor,
        state: dict[str, Any],
        options: TeZOOptions | LOZOOptions,
        seed: int,
        rank: int,
        share: Share | None = None,
    ) -> None:
        super().__init__(name, matrices, state, options, seed, share)
        self.rank = rank
        self.factor = rank**-0.5 if options.scale == "unit" else 1.0
        self.spread = self.factor * rank**0.5
        self.epoch: int | None = None
        chosen = options.factor_dtype if isinstance(options, TeZOOptions) else None
        self.factor_dtype = getattr(torch, chosen) if chosen else matrices.dtype
        # A step is small beside the undoing in the same product: rounded no further than the weights are.
        self.product_dtype = torch.promote_types(self.factor_dtype, matrices.dtype)
        state.setdefault("rank", rank)

    def product(self, step: int, amount: float) -> tuple[Tensor, Tensor]:
        """(E, M, R) and (E, N, R) whose product is `amount` times the step's direction."""
        raise NotImplementedError

    def _move(self, step: int, amount: float, first: int = 0, last: int | None = None) -> None:
        left, right = self.product(step, amount)
        if not first and last is None:
            self.add(left, right)
            return
        for block, l_MR, r_RN in islice(self._blocks(left, right), first, last):
            self._put_back(block, l_MR, r_RN)

    def direction(self, step: int) -> Tensor:
        """The step's direction as one tensor, shaped like `value`."""
        left, right = self.product(step, 1.0)
        return left @ right.mT

    def add(self, left: Tensor, right: Tensor, keep: float = 1.0) -> None:
        """Weights = keep * weights + left @ right^T."""
        if self.value.dtype != left.dtype:
            for block, l_MR, r_RN in self._blocks(left, right):
                added = l_MR @ r_RN
                if keep != 1:
                    block.mul_(keep)
                block.add_(added)
                self.done += 1
        elif len(left) == 1:
            self.value[0].addmm_(left[0], right[0].mT, beta=keep)
        else:
            self.value.baddbmm_(left, right.mT, beta=keep)

    def drawn(self, side: str, length: int, epoch: int, rows: slice | None = None) -> Tensor:
        """A factor (E, length, R), or these rows of it, that stays for an epoch: drawn on the CPU, the same
        on every device.
        """
        random = generator(torch.device("cpu"), side, self.seed, self.name, epoch)
        with torch.inference_mode(False):
            made = torch.randn(len(self.value), length, self.rank, generator=random)
            if rows is not None:
                made = made[:, rows].clone()
            return made.to(device=self.value.device, dtype=self.factor_dtype)

    def _blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of the weights, the rows of `left` for each, and all of `right`, transposed."""
        for matrix, l_MR, r_NR in zip(self.value, left, right, strict=True):
            for rows in self._rows():
                yield matrix[rows], l_MR[rows], r_NR.mT

    def _put_back(self, block: Tensor, left: Tensor, right_t: Tensor) -> None:
        if block.dtype == left.dtype:
            block.addmm_(left, right_t)
        else:
            block.add_(left @ right_t)

    def _rows(self) -> Iterator[slice]:
        rows, columns = self.value.shape[-2:]
        many = max(1, block_size(self.value.device) // max(columns, 1))
        for start in range(0, rows, many):
            yield slice(start, min(start + many, rows))


class CPPiece(LowRankPiece):
    """TeZO's: both factors stay; a step draws E * R numbers.

    Args:
        name: The parameter's.
        matrices: (E, M, N), sharing its memory.
        state: Its entry of the optimiser's state.
        options: The optimiser's.
        seed: Of its directions.
        rank: Of each direction.
        tau: Gives the (E * R,) numbers of a step.
        share: Which rows `matrices` are, where other processes hold others.
    """

    def __init__(
        self,
        name: str,
        matrices: Tensor,
        state: dict[str, Any],
        options: TeZOOptions,
        seed: int,
        rank: int,
        tau: Callable[[int], Tensor],
        share: Share | None = None,
    ) -> None:
        super().__init__(name, matrices, state, options, seed, rank, share)
        self._tau = tau
        self._every, self._refresh = options.refresh_interval, options.refresh_state
        if "u" in state:  # factors that were saved with the state
            self.u, self.v = (state.pop(side).to(matrices.device) for side in ("u", "v"))
            self.epoch = state.get("epoch", 0)

    def tau(self, step: int) -> Tensor:
        """(E, R) numbers of the step."""
        return self._tau(step).to(self.wide).view(len(self.value), self.rank)

    def product(self, step: int, amount: float) -> tuple[Tensor, Tensor]:
        """(E, M, R) and (E, N, R) whose product is `amount` times the step's direction."""
        self.turn(step)
        return self._product(self.tau(step).mul(amount))

    def _update(self, step: Step) -> None:
        """Means live on tau."""
        self.turn(step.number)
        tau, variant = self.tau(step.number), self.options.variant
        running = self.running(tau.shape)
        along = self.along(tau * step.kappa, running)
        if variant in ("adam", "lion"):
            self._uneven(step, along, running)
            return
        if not step.decay:
            if "coefficients" not in self.state:
                with torch.inference_mode(False):
                    self.state["coefficients"] = torch.zeros_like(tau)
            self.state["coefficients"].sub_(along, alpha=step.lr)
        whole = tau.mul(step.undo * (1 - step.decay)).sub_(along, alpha=step.lr)
        self.add(*self._product(whole), keep=1 - step.decay)

    def turn(self, step: int) -> None:
        """Draw the factors that hold at a step, where they aren't there; carry running means over to them."""
        epoch = step // self._every if self._every else 0
        if epoch != self.epoch:
            self.u, self.v = self._factors(epoch)
            self.epoch = epoch
        before = self.state.setdefault("epoch", epoch)
        if before != epoch:
            self._carry(*self._factors(before))
            self.state["epoch"] = epoch

    def _factors(self, epoch: int) -> tuple[Tensor, Tensor]:
        rows, columns = self.whole_shape[-2:]
        mine = None if self.share is None else self.share.rows
        return self.drawn("u", rows, epoch, mine), self.drawn("v", columns, epoch)

    def _carry(self, old_u: Tensor, old_v: Tensor) -> None:
        """Running means of old factors, as the new ones can say them; squares have no sign and stay."""
        mean = self.state.get("mean")
        if mean is not None and self._refresh == "project":
            u, v, old_u, old_v = (factor.to(self.wide) for factor in (self.u, self.v, old_u, old_v))
            gram = (u.mT @ u) * (v.mT @ v)
            wanted = (((u.mT @ old_u) * (v.mT @ old_v)) @ mean[..., None]).to(gram.dtype)
            # `lstsq` gives other bits each time; the Gram matrix of all products is positive definite.
            mean.copy_(torch.linalg.solve(gram, wanted)[..., 0])
            return
        for name in ("mean", "square"):
            if name in self.state:
                self.state[name].zero_()
        self.state.pop("updates", None)
        self.state.pop("coefficients", None)

    def _product(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """U times (E, R) numbers and the scale of the directions, and V."""
        left = self.u.to(self.wide) * numbers.mul(self.factor)[:, None, :]
        return left.to(self.product_dtype), self.v.to(self.product_dtype)

    def _uneven(self, step: Step, along: Tensor, running: list[Tensor]) -> None:
        """Steps that are no multiple of one product: each weight's mean over its root, or its sign."""
        adam = self.options.variant == "adam"
        low1, low2 = self.count() if adam else (1.0, 1.0)
        tau, wide = self.tau(step.number), self.wide
        columns = self.value.shape[-1]
        many = next(self._rows(), slice(0, 0)).stop
        room = torch.empty(2, many * columns, dtype=wide, device=self.value.device)
        for e, matrix in enumerate(self.value):
            u, v_t = self.u[e].to(wide), self.v[e].to(wide).mT
            mean = u * along[e].mul(self.factor)
            back = u * tau[e].mul(self.factor * step.undo)
            v2_t = v_t.square() if adam else v_t
            square = u.square() * running[1][e].mul(self.factor**2 / low2) if adam else u
            for part in self._rows():
                block = matrix[part]
                shape = (part.stop - part.start, columns)
                above = torch.mm(mean[part], v_t, out=room[0][: shape[0] * columns].view(shape))
                if step.undo:
                    self._put_back(block, back[part], v_t)
                self.done += 1
                if step.decay:
                    block.mul_(1 - step.decay)
                if adam:
                    root = torch.mm(square[part], v2_t, out=room[1][: shape[0] * columns].view(shape))
                    add_quotient(block, above, root.sqrt_().add_(self.options.eps), -step.lr / low1)
                else:
                    block.add_(above.sign_(), alpha=-step.lr)


class LazyPiece(LowRankPiece):
    """LOZO's: V stays for `interval` steps, U is drawn in each."""

    def __init__(
        self,
        name: str,
        matrices: Tensor,
        state: dict[str, Any],
        options: LOZOOptions,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__(name, matrices, state, options, seed, rank)
        self._interval = options.interval

    def product(self, step: int, amount: float) -> tuple[Tensor, Tensor]:
        """(E, M, R) and (E, N, R) whose product is `amount` times the step's direction."""
        self.turn(step)
        return self._noise(step).mul_(amount * self.factor), self.v

    def _update(self, step: Step) -> None:
        """The mean lives on U."""
        self.turn(step.number)
        noise = self._noise(step.number)
        gradient = noise.to(self.wide) * step.kappa
        along = self.along(gradient, self.running(gradient.shape))
        whole = noise.to(self.wide).mul(step.undo * (1 - step.decay)).sub_(along, alpha=step.lr)
        self.add(whole.mul_(self.factor).to(noise.dtype), self.v, keep=1 - step.decay)

    def turn(self, step: int) -> None:
        """Draw the V that holds at a step; carry the running mean over to a new one."""
        epoch, columns = step // self._interval, self.value.shape[-1]
        if epoch != self.epoch:
            self.v = self.drawn("v", columns, epoch)
            self.epoch = epoch
        before = self.state.setdefault("epoch", epoch)
        if before != epoch:
            if "mean" in self.state:
                # V^T V is about N times the identity.
                turned = (self.drawn("v", columns, before).mT @ self.v).to(self.wide) / columns
                self.state["mean"].copy_(self.state["mean"] @ turned)
            self.state["epoch"] = epoch

    def _noise(self, step: int) -> Tensor:
        random = generator(self.value.device, "left", self.seed, self.name, step)
        made = torch.empty(
            len(self.value), self.value.shape[-2], self.rank, dtype=torch.float32, device=self.value.device
        )
        return made.normal_(generator=random).to(self.factor_dtype)
