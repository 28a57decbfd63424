"""AdaGC: clip every parameter tensor's gradient against the running mean of its own clipped norms.

Problem  One bad batch or one corrupted tensor enters the optimiser's moments and the loss spikes. A global
         norm hardly sees a fault in a small tensor, and lets a fault in a big one scale everything down.
Method   `rule.py` says what happens to a vector of norms; this file gathers the norms, scales the gradients
         in place and keeps the state: one float32 per tensor and a step count.
Cost     One read of the gradients for the norms. On a CPU only clipped tensors are scaled; on an accelerator
         every gradient is, and the host never waits. Sharded: one all-reduce of one vector per mesh axis.
Letters  P parameters, S slots (one for each parameter, or one for each slice of a stacked one)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.checkpoints.names import nearest_tensor
from weightsmith.errors import InputError
from weightsmith.training.adagc import memory
from weightsmith.training.adagc.attachment import Attachment
from weightsmith.training.adagc.options import SHORT_RUN, AdaGCOptions
from weightsmith.training.adagc.rule import Clipping, clip_norms
from weightsmith.training.adagc.scaling import scale_on_device, scale_on_host
from weightsmith.training.adagc.watch import Watch
from weightsmith.training.names import Parameters, named_parameters
from weightsmith.training.sharded import Slots, TensorNorms, local_gradient, spread

logger = logging.getLogger(__name__)

ALL_TOGETHER = Slots(start=0, count=1, axis=None, local_start=0, local_count=1)


class AdaGCStats(NamedTuple):
    """What one step saw and did. Tensors stay on the device: to read them is the caller's synchronisation.

    Attributes:
        pre_norm: Norms before clipping, (S,) float32, in the order of `AdaGC.names`.
        coef: Factor on each gradient, (S,) float32; 0 where it was not finite.
        global_norm: Norm of all finite gradients before clipping, 0-d float32.
    """

    pre_norm: Tensor
    coef: Tensor
    global_norm: Tensor


class Measured(NamedTuple):
    """What has to be done to the gradients, and the statistics.

    Attributes:
        gradients: This process's pieces, in the order of the parameters; None where there is none.
        factor_S: Factor for each slot, (S,) float32.
        bad_S: Slots whose gradient is not finite, (S,) bool; it has to become zero.
        stats: What `AdaGC.step` returns.
    """

    gradients: list[Tensor | None]
    factor_S: Tensor
    bad_S: Tensor
    stats: AdaGCStats


class _Norms(NamedTuple):
    """Norms that the rule sees, the norm of all finite gradients, and which slots are not finite."""

    norm_S: Tensor
    total: Tensor
    bad_S: Tensor


class AdaGC:
    """Adaptive per-tensor gradient clipping for any optimiser.

    Call `step()` where `clip_grad_norm_` stood: after the backward pass (and `scaler.unscale_`), before
    `optimizer.step()`. Or `attach` it to the optimiser and forget it.

    Args:
        params: A module, parameters, `named_parameters()` or an optimiser's groups. Names make the saved
            state independent of the order, so prefer a module. With `fully_shard`, make it after sharding.
        options: All options at once; see `AdaGCOptions`.
        exclude: True for parameters that keep out of the per-tensor rule, beside the patterns of the options.
        total_steps: Planned length of the run, when known: a short run with `init="min"` gets a warning.
        compile: Compile the rule and the scaling (`torch.compile`, one graph each): worth it on an
        accelerator. **fields: Single options by name.

    Raises:
        InputError: no or duplicate parameters, an unknown option, a pattern that matches nothing.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> clip = AdaGC(model, init="ema")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> stats = clip.step()
        >>> optimizer.step()
        >>> clip.names
        ('weight', 'bias')
    """

    def __init__(
        self,
        params: Parameters,
        options: AdaGCOptions | Mapping[str, Any] | None = None,
        *,
        exclude: Callable[[str, Tensor], bool] | Iterable[str] | None = None,
        total_steps: int | None = None,
        compile: bool = False,
        **fields: Any,
    ) -> None:
        if exclude is not None and not callable(exclude):
            fields["exclude"] = exclude
        self.options = AdaGCOptions.of(options, **fields)
        self._excludes = exclude if callable(exclude) else lambda name, parameter: False
        self._named = named_parameters(params, "AdaGC")
        self._compiled = compile
        self._rule = torch.compile(clip_norms, fullgraph=True) if compile else clip_norms
        self._rescale = torch.compile(scale_on_device, fullgraph=True) if compile else scale_on_device
        self._norms: TensorNorms | None = None
        self._restored: Mapping[str, Any] | None = None
        self._seen_gradient = False
        self._check_patterns()
        self._advise(total_steps)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each slot: a parameter's, with `[i]` for a slice of a stacked one; `*` for all together."""
        if self.options.granularity == "global":
            return ("*",)
        return self._slot_names()

    @property
    def slots(self) -> list[Slots]:
        """Where each parameter's norms stand in a vector of slots, in the order of the parameters."""
        return self._layout().slots

    @property
    def steps(self) -> int:
        """Steps that had a gradient. Reading it waits for the device."""
        self._layout()
        return int(self._steps)

    @property
    def gamma(self) -> Tensor:
        """Running means, (S,) float32 in the order of `names`; infinity where none is known. Not a copy."""
        self._layout()
        return self._gamma

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> AdaGCStats:
        """Clip the gradients in place. Every process must call it, also one that holds no gradient.

        Args:
            grad_scale: 0-d factor that the gradients still carry (a loss scaler's); they keep it.
            found_inf: 0-d, not 0 where a loss scaler will skip this step: then nothing changes.

        Raises:
            InputError: a sparse gradient.
            NonFiniteGradientError: a NaN or infinity under `nonfinite="error"` (nothing was changed), or in
                one tensor for too many steps in a row.
        """
        measured = self.measure(grad_scale=grad_scale, found_inf=found_inf)
        held = [
            (g, s) for g, s in zip(measured.gradients, self._layout().slots, strict=True) if g is not None
        ]
        if measured.bad_S.device.type == "cpu" and not self._compiled:
            scale_on_host(held, measured.factor_S, measured.bad_S)
        else:
            factors = [spread(slots, measured.factor_S, g.ndim).to(g.device) for g, slots in held]
            empty = [spread(slots, measured.bad_S, g.ndim).to(g.device) for g, slots in held]
            self._rescale([g for g, _ in held], factors, empty)
        return measured.stats

    @torch.no_grad()
    def measure(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Measured:
        """All of `step` but the scaling, for an optimiser that scales inside its own kernel."""
        layout = self._layout()
        gradients = [local_gradient(parameter, name) for name, parameter in self._named]
        self._notice(gradients)
        seen = self._measure(layout, gradients, grad_scale)
        clipping = self._rule(
            seen.norm_S, seen.total, self._gamma, self._steps, self.options, self._excluded_S
        )
        bad_S = seen.bad_S
        if found_inf is not None:
            skip = found_inf.to(bad_S.device) > 0
            bad_S = bad_S & ~skip
            clipping = clipping._replace(
                coefficient_S=torch.where(skip, 1.0, clipping.coefficient_S),
                gamma_S=torch.where(skip, self._gamma, clipping.gamma_S),
                steps=torch.where(skip, self._steps, clipping.steps),
                live_S=clipping.live_S & ~skip,
            )
        self._watch.look(bad_S)
        self._gamma.copy_(clipping.gamma_S)
        self._steps.copy_(clipping.steps)
        self._count(clipping, bad_S)
        stats = AdaGCStats(seen.norm_S, clipping.coefficient_S, clipping.global_norm)
        return Measured(gradients, clipping.coefficient_S.expand(len(bad_S)), bad_S, stats)

    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Clip before every `optimizer.step()`, and keep the state in the first group of its state, under
        `adagc`.

        Groups added to the optimiser later are clipped too. Loss scaling is understood, fused optimisers
        included. A closure can't be used: its backward pass would run after the clipping.

        Returns:
            A handle; `remove()` or the end of a `with` block detaches.
        """
        return Attachment(self, optimizer)

    def add_new(self, params: Parameters) -> None:
        """Clip those of `params` too that are not clipped yet; their running means start unset."""
        known = {id(parameter) for _, parameter in self._named}
        new = [
            (name, parameter)
            for name, parameter in named_parameters(params, "AdaGC")
            if id(parameter) not in known
        ]
        state = self.state_dict()
        taken = {name for name, _ in self._named}
        for name, parameter in new:
            # An unnamed parameter is called by its place, which another may have had before.
            self._named.append((name if name not in taken else f"param_{len(self._named)}", parameter))
        self._norms = None
        self._restored = state

    def summary(self) -> dict[str, float]:
        """Share of clipped norms, smallest factor and number of non-finite norms since the last summary.

        Reading it waits for the device.
        """
        self._layout()
        clipped, seen, smallest, nonfinite = self._tally.tolist()
        self._tally.copy_(_tally(self._tally.device))
        return {"clip_rate": clipped / max(seen, 1.0), "min_coef": smallest, "nonfinite": nonfinite}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers: JSON holds it, and float32 comes back bit for bit.

        Keyed by names without wrapper prefixes: the order of parameters and the number of processes may
        change. With `granularity="shard"` it is this process's own.
        """
        if self._norms is None and self._restored is not None:
            return dict(self._restored)
        self._layout()
        return memory.pack(*self._remembered(), self._gamma, self.steps)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.
            strict: Require the same names; otherwise unknown ones are dropped and missing ones start unset.

        Raises:
            InputError: not such a state; other names; a stack of another length.
        """
        self._layout()
        names, slots = self._remembered()
        memory.check(state, names, strict)
        self._gamma.copy_(memory.unpack(state, names, slots))
        self._steps.fill_(int(state["step"]))

    def _layout(self) -> TensorNorms:
        """Layout of the norms, and the state; made at first use, when the model has its device and shards."""
        if self._norms is not None:
            return self._norms
        names = [name for name, _ in self._named]
        norms = TensorNorms([p for _, p in self._named], [self._stack_axis(name) for name in names], names)
        self._norms = norms
        length = 1 if self.options.granularity == "global" else norms.num_slots
        self._gamma = torch.full((length,), torch.inf, dtype=torch.float32, device=norms.device)
        self._steps = torch.zeros((), dtype=torch.int64, device=norms.device)
        self._tally = _tally(norms.device)
        self._watch = Watch(self._slot_names, self.options, norms.num_slots, norms.device)
        outside: list[bool] = []
        for (name, parameter), slots in zip(self._named, norms.slots, strict=True):
            outside += [self._is_excluded(name, parameter)] * slots.count
        self._excluded_S = torch.tensor(outside, device=norms.device) if any(outside) else None
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.load_state_dict(state, strict=False)
        return norms

    def _remembered(self) -> tuple[list[str], list[Slots]]:
        if self.options.granularity == "global":
            return ["*"], [ALL_TOGETHER]
        return [name for name, _ in self._named], self._layout().slots

    def _slot_names(self) -> tuple[str, ...]:
        return tuple(
            name if slots.axis is None else f"{name}[{i}]"
            for (name, _), slots in zip(self._named, self._layout().slots, strict=True)
            for i in range(slots.count)
        )

    def _measure(
        self, layout: TensorNorms, gradients: list[Tensor | None], grad_scale: Tensor | None
    ) -> _Norms:
        pieces_S = layout.squares(gradients)
        squares_S = layout.reduce(pieces_S)
        finite_S = torch.isfinite(squares_S)
        counted_S = finite_S
        if self._excluded_S is not None and self.options.exclude_mode == "none":
            counted_S = finite_S & ~self._excluded_S
        total = torch.where(counted_S, squares_S, 0.0).sum().sqrt()
        if self.options.granularity == "shard":
            # A tensor that is not finite on another process is not finite here.
            squares_S = torch.where(finite_S, pieces_S, squares_S)
        norm_S = total.reshape(1) if self.options.granularity == "global" else squares_S.sqrt()
        if grad_scale is not None:
            scale = grad_scale.to(norm_S.device)
            norm_S, total = norm_S / scale, total / scale
        return _Norms(norm_S.float(), total.float(), ~finite_S)

    def _count(self, clipping: Clipping, bad_S: Tensor) -> None:
        live_S = clipping.live_S
        clipped = (clipping.coefficient_S < 1) & live_S
        smallest = torch.where(live_S, clipping.coefficient_S, 1.0).min()
        old = self._tally
        self._tally = torch.stack(
            [
                old[0] + clipped.sum(),
                old[1] + live_S.sum(),
                torch.minimum(old[2], smallest),
                old[3] + bad_S.sum(),
            ]
        )

    def _stack_axis(self, name: str) -> int | None:
        return next(
            (axis for pattern, axis in self.options.stacked.items() if fnmatchcase(name, pattern)), None
        )

    def _is_excluded(self, name: str, parameter: Tensor) -> bool:
        matched = any(fnmatchcase(name, pattern) for pattern in self.options.exclude)
        return matched or bool(self._excludes(name, parameter))

    def _check_patterns(self) -> None:
        for key, patterns in (("exclude", self.options.exclude), ("stacked", self.options.stacked)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name, _ in self._named):
                    hint = nearest_tensor(pattern, [name for name, _ in self._named])
                    raise InputError(f"AdaGC: {key}: `{pattern}` matches no parameter{hint}")

    def _advise(self, total_steps: int | None) -> None:
        options = self.options
        if options.lambda_rel < 1:
            logger.warning(
                "AdaGC: lambda_rel %g < 1 shrinks every gradient on every step", options.lambda_rel
            )
        if options.warmup_steps == 0:
            logger.warning(
                "AdaGC: without warm-up steps the first norm of each tensor seeds its running mean"
            )
        if total_steps is not None and total_steps < SHORT_RUN and options.init == "min":
            logger.warning(
                'AdaGC: %d steps are few for a mean that starts at the smallest norm; init="ema" needs less',
                total_steps,
            )
        experts = [n for n, p in self._named if p.ndim == 3 and "expert" in n and self._stack_axis(n) is None]
        if experts:
            logger.warning(
                "AdaGC: %s stacks experts that share one mean; stacked={'%s': 0} clips each by itself",
                experts[0],
                experts[0],
            )

    def _notice(self, gradients: list[Tensor | None]) -> None:
        if self._seen_gradient:
            return
        if all(gradient is None for gradient in gradients):
            logger.warning("AdaGC: no gradient anywhere; step() belongs after backward, AdaGC after sharding")
        self._seen_gradient = True


def _tally(device: torch.device) -> Tensor:
    """Clipped norms, norms seen, smallest factor, non-finite norms."""
    return torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
