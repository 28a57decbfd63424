"""AdamW that clips with AdaGC on its way through the gradients.

On a CPU the clipping factor goes into torch's fused kernel as that tensor's gradient scale, so the gradients
are read twice (norms, update) and written once, where clip-then-step reads them three times and writes them
once: one pass over all gradients less. `p.grad` holds the clipped gradient afterwards, as it would after
`AdaGC.step`. On other devices one launch covers many tensors and takes one scale, so clipping runs first, as
`AdaGC.step` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.training.adagc.attachment import with_clipper, without_clipper
from weightsmith.training.adagc.clipper import AdaGC, Measured
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.adagc.scaling import scale_on_host
from weightsmith.training.names import Parameters
from weightsmith.training.sharded import local


class AdaGCAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with adaptive per-tensor clipping inside its step.

    Args:
        params: As for AdamW; names, where given, key the clipper's saved state.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay; it never enters the clipped norm.
        clip: Options of the clipping, see `AdaGCOptions`.
        total_steps: Planned length of the run, when known: `AdaGC` warns where its start needs more.
        fused: Use torch's fused kernel; None where it has one (float parameters on a CPU or a CUDA device).
        **kwargs: Further arguments of AdamW.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdaGCAdamW(model.named_parameters(), lr=1e-3, clip={"init": "ema"})
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.clip.steps
        1
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip: AdaGCOptions | Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        fused: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=False, **kwargs)  # pyrefly: ignore
        if fused is None:
            plain = not any(kwargs.get(name) for name in ("foreach", "capturable", "differentiable"))
            fused = plain and all(_has_kernel(p) for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            group["fused"] = fused
        self.defaults["fused"] = fused
        # A loss scaler then hands over its scale instead of dividing the gradients in a pass of its own.
        self._step_supports_amp_scaling = bool(fused)
        self.clip = AdaGC(self, clip, total_steps=total_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its tensors are clipped from their first gradient on."""
        super().add_param_group(param_group)
        if hasattr(self, "clip"):
            self.clip.add_new(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyrefly: ignore
        """Clip and update. A closure is run once, before the clipping.

        Raises:
            NonFiniteGradientError: as `AdaGC.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        group = self.param_groups[0]
        if not group["fused"] or local(group["params"][0]).device.type != "cpu":
            self.clip.step(**scale)
            # Once a plain AdamW exists, torch has wrapped its step to run hooks; ours runs them already.
            step = torch.optim.AdamW.step
            inner = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
            inner(self)
            return loss
        self._step_in_kernel(self.clip.measure(**scale), **scale)
        return loss

    def _step_in_kernel(
        self, measured: Measured, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        places = dict(zip(map(id, parameters), self.clip.slots, strict=True))
        factors, bad = measured.factor_S.tolist(), measured.bad_S.tolist()
        for group in self.param_groups:
            together: dict[tuple[torch.dtype, float], list[_Row]] = {}
            for row in self._rows(group):
                place = places[id(row.parameter)]
                factor = 1.0
                if place.axis is None and not bad[place.start]:
                    factor = factors[place.start]
                else:
                    scale_on_host([(row.gradient, place)], measured.factor_S, measured.bad_S)
                together.setdefault((row.parameter.dtype, factor), []).append(row)
            for (_, factor), rows in together.items():
                scale = grad_scale
                if factor != 1:
                    inverse = torch.tensor(1.0 / factor)
                    scale = inverse if grad_scale is None else inverse * grad_scale.cpu()
                _update(rows, group, scale, found_inf)

    def _rows(self, group: dict[str, Any]) -> list[_Row]:
        """What the kernel needs of each parameter with a gradient; AdamW makes the state on first use."""
        params: list[Tensor] = []
        gradients: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        maxima: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, gradients, means, squares, maxima, steps)
        return [
            _Row(params[i], local(gradients[i]), local(means[i]), local(squares[i]), maximum, steps[i])
            for i, maximum in enumerate([local(most) for most in maxima] or [None] * len(params))
        ]

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state; the clipper's is in the first group, under `adagc`."""
        return with_clipper(super().state_dict(), self.clip)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore both states; with a plain AdamW's the clipping starts fresh, and says so.

        Raises:
            InputError: the clipper's state is of other tensors.
        """
        super().load_state_dict(without_clipper(state_dict, self.clip))


class _Row(NamedTuple):
    """One parameter and this process's pieces of what belongs to it."""

    parameter: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    maximum: Tensor | None
    step: Tensor


def _update(rows: list[_Row], group: dict[str, Any], scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Run torch's fused AdamW on tensors of one dtype; it stores the gradients divided by `scale`."""
    steps = [row.step for row in rows]
    flag = None if found_inf is None else found_inf.to("cpu", torch.float32)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        [local(row.parameter) for row in rows],
        [row.gradient for row in rows],
        [row.mean for row in rows],
        [row.square for row in rows],
        [row.maximum for row in rows if row.maximum is not None],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        grad_scale=None if scale is None else scale.to("cpu", torch.float32),
        found_inf=flag,
    )
    if flag is not None:
        torch._foreach_sub_(steps, [flag] * len(steps))


def _has_kernel(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and local(parameter).device.type in ("cpu", "cuda")
