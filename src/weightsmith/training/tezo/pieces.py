"""One parameter's directions and what a variant makes of them.

    CPPiece     TeZO   Z = U diag(tau) V^T, only tau is drawn in each step
    LazyPiece   LOZO   Z = U V^T, U drawn in each step, V every so many
    DensePiece  MeZO   Z a Gaussian number for every weight; and what has fewer than two axes in the others

Each can add a multiple of its direction to the weights, and can make its step, from weights at which a
multiple of the direction is still to be added (the undoing of the last probe): both in one pass over them.
No temporary has more than a block of numbers, apart from factors.

Letters  E stacked matrices (1 as a rule), M rows, N columns, R rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.training.sharded import local
from weightsmith.training.tezo.noise import generator
from weightsmith.training.tezo.options import LOZOOptions, TeZOOptions, ZerothOrderOptions
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
    """

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
        # Running sums lose small terms in 16 bits.
        self.wide = torch.float32 if value.dtype.itemsize < 4 else value.dtype

    def move(self, step: int, amount: float) -> None:
        """Add `amount` times the step's direction to the weights."""
        raise NotImplementedError

    def update(self, step: Step) -> None:
        """One step of the variant."""
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

    def move(self, step: int, amount: float) -> None:
        """Add `amount` times the step's direction to the weights."""
        for weights, noise, _ in self._blocks(step):
            weights.add_(noise, alpha=amount)

    def update(self, step: Step) -> None:
        """One step of the variant, block by block."""
        running, variant = self.running(self.value.shape, self.share), self.options.variant
        lacking = self.count() if variant == "adam" else (1.0, 1.0)
        for weights, noise, part in self._blocks(step.number):
            if variant == "sgd" and not step.decay:
                weights.add_(noise, alpha=step.undo - step.lr * step.kappa)
                continue
            if step.undo:
                weights.add_(noise, alpha=step.undo)
            if step.decay:
                weights.mul_(1 - step.decay)
            gradient = noise.to(self.wide).mul_(step.kappa)
            chosen = [each if part is None else each.view(-1)[part] for each in running]
            along = self.along(gradient, chosen)
            if variant == "adam":
                root = torch.sqrt(chosen[1], out=gradient)
                root.mul_(lacking[1] ** -0.5).add_(self.options.eps)
                _add_quotient(weights, along, root, -step.lr / lacking[0])
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
        self.epoch: int | None = None
        chosen = options.factor_dtype if isinstance(options, TeZOOptions) else None
        self.factor_dtype = getattr(torch, chosen) if chosen else matrices.dtype
        # A step is small beside the undoing in the same product: rounded no further than the weights are.
        self.product_dtype = torch.promote_types(self.factor_dtype, matrices.dtype)
        state.setdefault("rank", rank)

    def product(self, step: int, amount: float) -> tuple[Tensor, Tensor]:
        """(E, M, R) and (E, N, R) whose product is `amount` times the step's direction."""
        raise NotImplementedError

    def move(self, step: int, amount: float) -> None:
        """Add `amount` times the step's direction to the weights."""
        self.add(*self.product(step, amount))

    def direction(self, step: int) -> Tensor:
        """The step's direction as one tensor, shaped like `value`."""
        left, right = self.product(step, 1.0)
        return left @ right.mT

    def add(self, left: Tensor, right: Tensor, keep: float = 1.0) -> None:
        """Weights = keep * weights + left @ right^T."""
        if self.value.dtype != left.dtype:
            for matrix, l_MR, r_NR in zip(self.value, left, right, strict=True):
                for rows in self._rows():
                    block = matrix[rows]
                    if keep != 1:
                        block.mul_(keep)
                    block.add_(l_MR[rows] @ r_NR.mT)
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

    def update(self, step: Step) -> None:
        """One step of the variant; means live on tau."""
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
            mean.copy_(torch.linalg.lstsq(gram, wanted).solution[..., 0])
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
                if step.decay:
                    block.mul_(1 - step.decay)
                if adam:
                    root = torch.mm(square[part], v2_t, out=room[1][: shape[0] * columns].view(shape))
                    _add_quotient(block, above, root.sqrt_().add_(self.options.eps), -step.lr / low1)
                else:
                    block.add_(above.sign_(), alpha=-step.lr)

    def _put_back(self, block: Tensor, left: Tensor, right_t: Tensor) -> None:
        if block.dtype == left.dtype:
            block.addmm_(left, right_t)
        else:
            block.add_(left @ right_t)


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

    def update(self, step: Step) -> None:
        """One step of the variant; the mean lives on U."""
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


def block_size(device: torch.device) -> int:
    """Numbers of a temporary."""
    return BLOCK if device.type == "cpu" else DEVICE_BLOCK


def _add_quotient(weights: Tensor, above: Tensor, below: Tensor, rate: float) -> None:
    """Add `rate` * above / below: rounded once, where the weights are 16 bits. `below` is used up."""
    if weights.dtype == above.dtype:
        weights.addcdiv_(above, below, value=rate)
    else:
        weights.add_(torch.div(above, below, out=below), alpha=rate)
