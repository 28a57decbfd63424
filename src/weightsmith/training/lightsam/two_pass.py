"""Optimisers that take two gradients of each batch: at the weights, and at a point near them where the loss
is higher.

    first_step    gradients are those at the weights x: remember x, move to w
    restore       back to x, bit for bit; the gradients are now those at w
    step          update x with them

`step(closure)` does all three and calls the closure twice. `LightSAM`, `SAM` and `ASAM` say where w lies and
what the update is; this class keeps the weights safe in between: what moved is restored, also when a
parameter has no second gradient, the closure raises, or a loss scaler skips the update. On a CPU, where
copies are a good part of a step, a parameter shows w from a second storage and keeps x in its own, so that
going back moves no bytes; elsewhere x is copied away and back. The second storages are no part of the state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.lightsam.replay import random_state, running_statistics_kept, set_random_state
from weightsmith.training.names import named_parameters
from weightsmith.training.sharded import TensorNorms, local, local_gradient

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """One parameter that has a gradient: this process's piece of both, as real numbers, and its group.

    Attributes:
        parameter: The parameter itself, the key of its state.
        value: Its local values, sharing memory.
        gradient: Its local gradient, sharing memory.
        group: Its parameter group.
    """

    parameter: Tensor
    value: Tensor
    gradient: Tensor
    group: dict[str, Any]


class SAMStats(NamedTuple):
    """The last step; tensors stay on the device.

    Attributes:
        loss: The closure's first value, or None.
        perturbed_loss: The closure's second value, or None.
        gradient_norm: Norm of all first gradients, 0-d, or None where it was not needed.
        perturbed_gradient_norm: Norm of all second gradients, 0-d, or None where it was not needed.
    """

    loss: Any = None
    perturbed_loss: Any = None
    gradient_norm: Tensor | None = None
    perturbed_gradient_norm: Tensor | None = None


class TwoPassOptimizer(torch.optim.Optimizer):
    """Keeps the order of the two passes and the weights in between; subclasses fill in `_ascend` and
    `_descend`.

    Args:
        params: As for any optimiser.
        defaults: Options of the groups.
        model: Its batch normalisation keeps its running statistics out of the second pass.
        replay_rng: Give both calls of a closure the same random numbers.
        check_finite: Skip steps whose gradients are not finite.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        replay_rng: bool = True,
        check_finite: bool = True,
    ) -> None:
        self.last = SAMStats()
        self.replay_rng = replay_rng
        self.check_finite = check_finite
        self._model = model
        self._phase = "idle"
        self._others: dict[Tensor, Tensor] = {}
        self._exchanged: list[Tensor] = []
        self._copied: list[Tensor] = []
        self._skip: bool | Tensor = False
        self._norms: TensorNorms | None = None
        self._skipped = 0
        self._told = False
        super().__init__(params, defaults)

    # What a subclass says.

    def _ascend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        """Move the weights from x to w. `norm` is that of all gradients, float64."""
        raise NotImplementedError

    def _descend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        """Update the weights, which are at x again, with the gradients at w."""
        raise NotImplementedError

    def _make_state(self, pieces: list[Piece]) -> None:
        """Make the state of a run that has not begun, so that a saved one can be loaded into it."""
        raise NotImplementedError

    _needs_norm = True
    """Whether the rule itself uses the norm of all gradients."""

    # What a user calls.

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scale: float | Tensor | None = None) -> None:
        """Go to the perturbed point. The gradients are those at the weights; they are used up.

        Args:
            zero_grad: Drop the gradients afterwards, ready for the second backward pass.
            grad_scale: Factor that a loss scaler put on them (`scaler.get_scale()`). Don't call
                `scaler.unscale_` for this pass: it can run only once a step, and the second pass needs it.

        Raises:
            InputError: already at the perturbed point; no parameter has a gradient.
        """
        if self._phase == "perturbed":
            raise InputError(f"{self._name}: first_step twice; call second_step() or restore() in between")
        if self._phase == "restored":
            # Someone decided against the last update, as a loss scaler does after an overflow.
            self._skipped += 1
        pieces = self._pieces()
        if not pieces:
            raise InputError(f"{self._name}: no parameter has a gradient; run forward and backward first")
        if grad_scale is not None:
            torch._foreach_div_([piece.gradient for piece in pieces], grad_scale)
        norm = self._norm(pieces)
        self._skip = self._is_bad(norm, pieces)
        self.last = SAMStats(gradient_norm=norm)
        self._phase = "perturbed"
        if self._skip is not True:
            pieces = self._keep(pieces)
            self._ascend(pieces, norm, self._skip if isinstance(self._skip, Tensor) else None)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the weights, bit for bit; gradients stay. A following `step()` updates with them.

        Raises:
            InputError: not at the perturbed point.
        """
        if self._phase != "perturbed":
            raise InputError(f"{self._name}: restore() without a first_step()")
        self._put_back()
        self._phase = "restored"

    def second_step(self, zero_grad: bool = False) -> None:
        """Back to the weights, and update them with the gradients of the perturbed point.

        Raises:
            InputError: no `first_step` before.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def perturbed(
        self, zero_grad: bool = True, *, grad_scale: float | Tensor | None = None
    ) -> Iterator[None]:
        """Run the second forward and backward pass inside; `step()` follows. Arguments as for `first_step`.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = SAM([w], torch.optim.SGD, lr=0.1, rho=0.1)
            >>> (w**2).sum().backward()
            >>> with optimizer.perturbed():
            ...     (w**2).sum().backward()
            >>> optimizer.step()
            >>> w.data
            tensor([0.7800])
        """
        self.first_step(zero_grad=zero_grad, grad_scale=grad_scale)
        try:
            with running_statistics_kept(self._model):
                yield
        except BaseException:
            self._abandon()
            raise
        self.restore()

    @torch.no_grad()
    def step(  # pyrefly: ignore
        self, closure: Callable[[], Any] | None = None, *, first_pass_done: bool = False
    ) -> Any:
        """One whole step with a closure, or without one the update that ends a step begun with `first_step`.

        Args:
            closure: Clears the gradients, runs forward and backward, returns the loss. Called twice, at the
                weights and at the perturbed point.
            first_pass_done: The gradients at the weights are there already; call the closure once. Random
                numbers are then not replayed.

        Returns:
            The loss at the weights; None where no closure computed it.

        Raises:
            InputError: no closure and no step begun; a step begun and a closure.
        """
        loss = None
        if closure is not None:
            loss = self._both_passes(closure, first_pass_done)
        elif self._phase == "idle" and self._asked_for_state():
            self._make_state(self._pieces())
            return None
        elif self._phase == "idle":
            raise InputError(
                f"{self._name}: step() without a step begun; call first_step() before the second backward "
                "pass, or pass a closure that runs forward and backward"
            )
        self._update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State and groups, without copies of weights.

        Raises:
            InputError: at the perturbed point, where the model's weights are not those to save either.
        """
        if self._phase == "perturbed":
            raise InputError(f"{self._name}: the weights are at the perturbed point; restore() before saving")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's, but running sums keep their dtype: torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        places = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(places, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(device=parameter.device, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between steps.

        Raises:
            InputError: in the middle of a step.
        """
        if self._phase != "idle":
            raise InputError(f"{self._name}: parameters can't be added between the two passes of a step")
        super().add_param_group(param_group)
        self._norms = None

    @property
    def skipped(self) -> int:
        """Steps that were not taken because a gradient was not finite, as far as the host knows."""
        return self._skipped

    # How it works.

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _asked_for_state(self) -> bool:
        """Whether this is torch's distributed checkpointing, which makes state by a step of rate 0."""
        rates = [float(group["lr"]) for group in self.param_groups]
        gradients = [piece.gradient for piece in self._pieces()]
        return bool(gradients) and not any(rates) and not any(bool(g.any()) for g in gradients)

    def _both_passes(self, closure: Callable[[], Any], first_pass_done: bool) -> Any:
        if self._phase == "perturbed":
            raise InputError(f"{self._name}: step(closure) in the middle of a step; call second_step()")
        devices = {local(p).device for group in self.param_groups for p in group["params"]}
        loss = None
        before = random_state(devices) if self.replay_rng and not first_pass_done else None
        if not first_pass_done:
            with torch.enable_grad():
                loss = closure()
        self.first_step(zero_grad=True)
        try:
            if before is not None:
                set_random_state(before)
            with torch.enable_grad(), running_statistics_kept(self._model):
                again = closure()
        except BaseException:
            self._abandon()
            raise
        self.last = self.last._replace(loss=_detached(loss), perturbed_loss=_detached(again))
        return loss

    def _update(self) -> None:
        """From the perturbed or the restored point to the next weights."""
        pieces = self._pieces()
        norm = self._norm(pieces) if pieces else None
        bad = self._is_bad(norm, pieces) if pieces else False
        self._put_back()
        if self._skip is True or bad is True:
            self._skipped += 1
            self._tell_skip()
        elif pieces:
            skip = next((flag for flag in (self._skip, bad) if isinstance(flag, Tensor)), None)
            if isinstance(self._skip, Tensor) and isinstance(bad, Tensor):
                skip = torch.maximum(self._skip, bad)
            self._descend([_renewed(piece) for piece in pieces], norm, skip)
        self.last = self.last._replace(perturbed_gradient_norm=norm)
        self._skip, self._phase = False, "idle"

    def _abandon(self) -> None:
        """Leave a step whose second pass failed: weights as they were, nothing updated."""
        with torch.no_grad():
            self._put_back()
        self._skip, self._phase = False, "idle"

    def _pieces(self) -> list[Piece]:
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = local_gradient(parameter)
                if gradient is not None:
                    found.append(Piece(parameter, real(local(parameter)), gradient, group))
        return found

    def _norm(self, pieces: list[Piece]) -> Tensor | None:
        """Norm of all gradients over all processes, 0-d float64."""
        if not (self._needs_norm or self.check_finite):
            return None
        squares = self._squares({piece.parameter: piece.gradient for piece in pieces})
        return squares.sum().sqrt()

    def _squares(self, tensors: dict[Tensor, Tensor]) -> Tensor:
        """Squared norms of one tensor for each parameter over all processes, (P,) float64."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self._norms is None:
            self._norms = TensorNorms(
                parameters, names=[name for name, _ in named_parameters(self, self._name)]
            )
        return self._norms([tensors.get(parameter) for parameter in parameters])

    def _is_bad(self, norm: Tensor | None, pieces: list[Piece]) -> bool | Tensor:
        """Whether to skip: known at once, or a flag on the device for kernels that can skip by themselves."""
        if norm is None or not self.check_finite:
            return False
        if norm.device.type == "cpu" or not self._can_skip(pieces):
            return not bool(torch.isfinite(norm))
        return torch.isfinite(norm).logical_not().float()

    def _can_skip(self, pieces: list[Piece]) -> bool:
        """Whether `_ascend` and `_descend` heed a flag that the host doesn't know."""
        return False

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        """Keep x of every piece; returns the pieces with the values that may now move."""
        for piece in pieces:
            held = self._others.get(piece.parameter)
            if held is None or held.shape != piece.value.shape or held.device != piece.value.device:
                self._others[piece.parameter] = torch.empty_like(piece.value)
        torch._foreach_copy_(
            [self._others[piece.parameter] for piece in pieces], [piece.value for piece in pieces]
        )
        self._exchanged = [piece.parameter for piece in pieces if _owns_its_storage(piece.parameter)]
        chosen = set(self._exchanged)
        self._copied = [piece.parameter for piece in pieces if piece.parameter not in chosen]
        self._exchange()
        return [_renewed(piece) for piece in pieces]

    def _put_back(self) -> None:
        """Bring every weight that moved back to x."""
        self._exchange()
        if self._copied:
            values = [real(local(parameter)) for parameter in self._copied]
            torch._foreach_copy_(values, [self._others[parameter] for parameter in self._copied])
        self._exchanged, self._copied = [], []

    def _exchange(self) -> None:
        for parameter in self._exchanged:
            parameter.data, self._others[parameter] = self._others[parameter], parameter.data

    def _tell_skip(self) -> None:
        if not self._told:
            self._told = True
            logger.warning("%s: a gradient is not finite; the step is skipped (told once)", self._name)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, sharing memory; any other tensor itself."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _renewed(piece: Piece) -> Piece:
    """The piece with the values its parameter has now."""
    return piece._replace(value=real(local(piece.parameter)))


def _owns_its_storage(parameter: Tensor) -> bool:
    """Whether nothing else can be meant to see this parameter move.

    Sharded and quantised parameters and pieces of a flat one are read through other tensors, and accelerators
    record addresses in graphs.
    """
    return (
        parameter.device.type == "cpu"
        and type(parameter) in (nn.Parameter, Tensor)
        and not parameter.is_complex()
        and parameter.numel() * parameter.itemsize == parameter.untyped_storage().nbytes()
    )


def _detached(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, Tensor) else loss
