"""`AlphaDecay`: hooks that give an optimiser one weight decay a matrix."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from weightsmith.errors import InputError
from weightsmith.runs.atomic import append_line, read_lines, write_bytes
from weightsmith.training.alphadecay import exponents as spectra
from weightsmith.training.alphadecay.groups import (
    check_groups,
    decays_in_place,
    decouples,
    has_scheduler,
    inner_optimizer,
    members_by_decay,
    one_group_each,
    update_fused,
)
from weightsmith.training.alphadecay.matrices import find_matrices
from weightsmith.training.alphadecay.options import AlphaDecayOptions, decay_factors

log = logging.getLogger(__name__)

Rule = Callable[[np.ndarray], np.ndarray]
"""Exponents fp64 (L,) -> factors of the base decay fp64 (L,), in place of the options' `assign`."""


class AlphaDecay:
    """Weight decay by matrix, from the tails of their spectra; looks again every `interval` optimiser steps.

    It hooks into `optimizer.step()`: nothing has to be called in the loop. Steps that a gradient scaler skips
    don't count.

    Args:
        model: The model whose parameters `optimizer` holds; wrappers (DDP, FSDP2, torch.compile) are seen
            through.
        optimizer: Any `torch.optim.Optimizer` whose groups have `weight_decay`.
        options: Settings; keywords of `AlphaDecayOptions` may be given instead.
        log_file: Where each look at the spectra adds a line of JSON (first rank only); see `plot.plot`.
        rule: A rule of your own in place of `assign`.
        group: Ranks that hold the same part of the model and share the work; all of them when left out.

    Attributes:
        options: The settings.
        mode: "decoupled" or "groups", whichever is in use.
        matrices: The parameters that take part.
        skipped: The other matrices: name -> reason.
        step: Optimiser steps done.
        history: One record for each look: step, alpha and weight_decay by name.

    Raises:
        InputError: no matrix can take part; a group has no `weight_decay`; `mode` is "groups" and a learning
            rate scheduler exists already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 200))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> decay = AlphaDecay(model, optimizer, interval=100)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in decay.weight_decays().values()]  # the square one has the heavier
        tail [0.067, 0.3]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        options: AlphaDecayOptions | None = None,
        *,
        log_file: str | Path | None = None,
        rule: Rule | None = None,
        group: dist.ProcessGroup | None = None,
        **keywords: Any,
    ) -> None:
        if options is not None and keywords:
            raise InputError(f"give `options` or keywords, not both: {', '.join(keywords)}")
        self.options = options if options is not None else AlphaDecayOptions(**keywords)
        self.matrices, self.skipped = find_matrices(model, self.options)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._optimizer = inner_optimizer(optimizer)
        self._log_file = Path(log_file) if log_file is not None else None
        self._rule = rule
        self._given_group = group
        self._names_checked = False
        self._alphas: np.ndarray | None = None
        self._factors: np.ndarray | None = None
        self._set_aside: list[tuple[dict[str, Any], float]] = []
        self._whole_groups: list[dict[str, Any]] = []
        self._split: tuple[tuple[Any, Any], list[tuple[int, dict[str, Any]]]] | None = None
        check_groups(self._optimizer, self.matrices, self.options)
        self.mode = self.options.mode
        if self.mode == "auto":
            self.mode = "decoupled" if decouples(self._optimizer) else "groups"
        if self.mode == "groups":
            ours = {id(matrix.parameter) for matrix in self.matrices}
            one_group_each(self._optimizer, ours, scheduled=has_scheduler(optimizer, self._optimizer))
        self._bases = self._read_bases()
        self._handles = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            # A step that raised leaves split groups or a decay of 0 behind, which must not be saved.
            self._optimizer.register_state_dict_pre_hook(lambda optimizer: self._restore()),
        )
        for name, reason in self.skipped.items():
            log.debug("%s keeps its group's weight decay: %s", name, reason)

    def alphas(self) -> dict[str, float]:
        """The last exponents by name (mean over pieces); NaN without a tail to fit, empty before the first
        look.
        """
        if self._alphas is None:
            return {}
        return {matrix.name: float(alpha) for matrix, alpha in zip(self.matrices, self._alphas, strict=True)}

    def weight_decays(self) -> dict[str, float]:
        """The decay of each matrix by name, as of now; empty before the first look."""
        if self._factors is None:
            return {}
        bases = self._current_bases()
        return {
            matrix.name: float(factor * base)
            for matrix, factor, base in zip(self.matrices, self._factors, bases, strict=True)
        }

    def report(self) -> list[dict[str, Any]]:
        """One row for each matrix of the model: name, shape, alpha and weight_decay, or why it takes no
        part.
        """
        alphas, decays = self.alphas(), self.weight_decays()
        rows: list[dict[str, Any]] = [
            {
                "name": matrix.name,
                "shape": tuple(matrix.parameter.shape),
                "alpha": alphas.get(matrix.name),
                "weight_decay": decays.get(matrix.name),
            }
            for matrix in self.matrices
        ]
        return rows + [{"name": name, "skipped": reason} for name, reason in self.skipped.items()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Look at the spectra now. In a group of ranks, a collective call.

        Raises:
            InputError: a matrix holds NaN or infinity and `on_nonfinite` is "raise".
        """
        group = spectra.world_group(self._given_group)
        if group is not None and not self._names_checked:
            spectra.check_same_names(self.matrices, group)
            self._names_checked = True
        pieces, broken = spectra.exponents(self.matrices, self.options, group)
        if broken and self.options.on_nonfinite == "raise":
            raise InputError(
                f"step {self.step}: {', '.join(broken[:4])} holds NaN or infinity: training is broken"
            )
        factors = self._factors_of(pieces)
        if broken:
            log.warning("step %d: NaN or infinity in %s; decay unchanged there", self.step, ", ".join(broken))
            kept = np.array([matrix.name in broken for matrix in self.matrices])
            factors[kept] = 1.0 if self._factors is None else self._factors[kept]
        # The mean over pieces that have an exponent.
        known = np.isfinite(pieces)
        self._alphas = np.where(
            known.any(1), np.where(known, pieces, 0.0).sum(1) / np.maximum(known.sum(1), 1), np.nan
        )
        self._factors = factors
        self._record(group)

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs to go on: steps done, exponents and factors by name; plain JSON values."""
        state: dict[str, Any] = {"step": self.step, "alpha": None, "factor": None, "base": None}
        if self._factors is not None:
            state["alpha"] = {name: _number(alpha) for name, alpha in self.alphas().items()}
            names = [matrix.name for matrix in self.matrices]
            state["factor"] = dict(zip(names, self._factors.tolist(), strict=True))
        if self.mode == "groups":
            state["base"] = {matrix.name: self._bases[id(matrix.parameter)] for matrix in self.matrices}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; lines of the log file from later steps are cut off.

        Raises:
            InputError: its matrices are not those that take part here.
        """
        names = [matrix.name for matrix in self.matrices]
        for key in ("alpha", "factor", "base"):
            if state[key] is not None and set(state[key]) != set(names):
                missing, unexpected = set(names) - set(state[key]), set(state[key]) - set(names)
                raise InputError(
                    f"this state is of other matrices: missing {sorted(missing)[:4]}, "
                    f"unexpected {sorted(unexpected)[:4]}"
                )
        self.step = int(state["step"])
        if state["base"] is not None and self.mode == "groups":
            self._bases = self._bases | {
                id(matrix.parameter): float(state["base"][matrix.name]) for matrix in self.matrices
            }
        self._factors = self._alphas = None
        if state["factor"] is not None:
            self._factors = np.array([state["factor"][name] for name in names], np.float64)
            alphas = [state["alpha"][name] for name in names]
            self._alphas = np.array([math.nan if alpha is None else alpha for alpha in alphas], np.float64)
        self.history = [record for record in self.history if record["step"] < self.step]
        if self._log_file is not None and _first_rank():
            _cut(self._log_file, self.step)

    def detach(self) -> None:
        """Take the hooks out: from now on the optimiser decays by its groups alone."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        if self.mode == "groups":
            for group in self._optimizer.param_groups:
                for parameter in group["params"][:1]:
                    group["weight_decay"] = self._bases.get(id(parameter), group["weight_decay"])

    def _factors_of(self, pieces: np.ndarray) -> np.ndarray:
        """Factor of each matrix: the mean over its pieces'."""
        numel = [matrix.parameter.numel() for matrix in self.matrices]
        layers = [matrix.layer for matrix in self.matrices]
        if self.options.assign == "sigmoid_gradnorm" and self._rule is None:
            norms = spectra.gradient_norms(self.matrices)
            return decay_factors(norms, self.options, numel=numel, layers=layers)
        counts = [len(matrix.piece_shapes()) for matrix in self.matrices]
        flat = np.concatenate([row[:count] for row, count in zip(pieces, counts, strict=True)])
        sizes = np.repeat([n / count for n, count in zip(numel, counts, strict=True)], counts)
        if self._rule is not None:
            factors = np.asarray(self._rule(flat), np.float64)
        else:
            factors = decay_factors(flat, self.options, numel=cast(Any, sizes))
            low, high = self.options.scale_range
            if self.options.assign == "linear" and low < high and len(flat) > 1 and np.all(factors == 1.0):
                log.warning(
                    "step %d: all exponents are equal, so every matrix gets the base decay", self.step
                )
        starts = np.cumsum([0, *counts[:-1]])
        return np.add.reduceat(factors, starts) / np.array(counts)

    def _record(self, group: dist.ProcessGroup | None) -> None:
        record = {
            "step": self.step,
            "alpha": {name: _number(alpha) for name, alpha in self.alphas().items()},
            "weight_decay": self.weight_decays(),
        }
        self.history.append(record)
        kinds: dict[str, list[float]] = {}
        for name, alpha in self.alphas().items():
            if not np.isnan(alpha):
                kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(alpha)
        means = ", ".join(f"{kind} {np.mean(values):.3f}" for kind, values in kinds.items())
        log.info("step %d: alpha %s", self.step, means)
        if self._log_file is not None and (group is None or group.rank() == 0):
            append_line(self._log_file, record)

    # ---- what happens around a step

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._restore()
        if self._factors is None or self.step % self.options.interval == 0:
            self.refresh()
        self.step += 1
        if self.mode == "groups":
            self._write_groups()
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
        if closure is None and not decays_in_place(self._optimizer, self.matrices):
            self._decay()
            return None
        # AdamW evaluates the closure first and decays then: so do we. Without one, ours comes after the hooks
        # of others, who may still change gradients.
        return (optimizer, self._then_decay(closure)), {}

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._restore()

    def _then_decay(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        decayed = False

        def evaluate() -> Any:
            nonlocal decayed
            loss = closure() if closure is not None else None
            if not decayed:
                decayed = True
                self._decay()
            return loss

        return evaluate

    @torch.no_grad()
    def _decay(self) -> None:
        """Have the coming update decay each matrix by its own value.

        In the optimiser's own pass where that goes through matrices one by one (or in its kernel, called from
        here); otherwise in a pass before it, and the optimiser is told not to.
        """
        if decays_in_place(self._optimizer, self.matrices):
            self._whole_groups = list(self._optimizer.param_groups)
            split = [{**self._whole_groups[place], **own} for place, own in self._split_groups()]
            self._optimizer.param_groups[:] = update_fused(self._optimizer, split)
            return
        factors = self._factor_by_id()
        for group in self._optimizer.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not any(id(parameter) in factors or id(parameter) in self._bases for parameter in members):
                continue
            decays = [
                float(factors.get(id(p), 1.0) * self._bases.get(id(p), group["weight_decay"]))
                for p in members
            ]
            self._set_aside.append((group, group["weight_decay"]))
            group["weight_decay"] = 0.0
            shrink = [1 - group["lr"] * decay for decay in decays]
            found_inf = getattr(self._optimizer, "found_inf", None)
            if found_inf is not None:  # a fused step that a gradient scaler may void on the device
                shrink = [torch.where(found_inf > 0, 1.0, value).squeeze() for value in shrink]
            locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in members]
            torch._foreach_mul_(locals_, shrink)

    def _split_groups(self) -> list[tuple[int, dict[str, Any]]]:
        """`members_by_decay` of the groups; made anew only when something it depends on has changed."""
        key = (
            self._factors,
            [(id(g["params"]), len(g["params"]), g["weight_decay"]) for g in self._whole_groups],
        )
        if self._split is None or self._split[0][0] is not key[0] or self._split[0][1] != key[1]:
            factors = self._factor_by_id()
            split = members_by_decay(
                self._whole_groups, lambda p, base: factors.get(id(p), 1.0) * self._bases.get(id(p), base)
            )
            self._split = key, split
        return self._split[1]

    def _factor_by_id(self) -> dict[int, float]:
        assert self._factors is not None
        return {id(matrix.parameter): f for matrix, f in zip(self.matrices, self._factors, strict=True)}

    def _restore(self) -> None:
        """Give groups their members and their decay back; also after a step that raised."""
        if self._whole_groups:
            self._optimizer.param_groups[:] = self._whole_groups
            self._whole_groups = []
        while self._set_aside:
            group, decay = self._set_aside.pop()
            group["weight_decay"] = decay

    def _write_groups(self) -> None:
        factors = self._factor_by_id()
        for group in self._optimizer.param_groups:
            key = id(group["params"][0]) if group["params"] else 0
            if key in self._bases:
                group["weight_decay"] = float(factors.get(key, 1.0) * self._bases[key])

    # ---- base decays

    def _read_bases(self) -> dict[int, float]:
        """Id of a parameter -> its base decay, where that is not simply what its group says at the moment."""
        given = self.options.base_weight_decay
        ours = {id(matrix.parameter) for matrix in self.matrices}
        homes = {
            id(p): group["weight_decay"] for group in self._optimizer.param_groups for p in group["params"]
        }
        bases: dict[int, float] = {}
        if given is not None or self.mode == "groups":
            bases = {key: homes[key] if given is None else given for key in ours}
        if self.options.decay_rest == "base":
            base = next(homes[key] for key in ours) if given is None else given
            bases |= {key: base for key in homes if key not in ours}
        return bases

    def _current_bases(self) -> np.ndarray:
        groups = self._whole_groups or self._optimizer.param_groups
        homes = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        homes |= {id(p): decay for group, decay in self._set_aside for p in group["params"]}
        keys = [id(matrix.parameter) for matrix in self.matrices]
        return np.array([self._bases.get(key, homes[key]) for key in keys])


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _cut(log_file: Path, step: int) -> None:
    """Drop the records of `step` and later, which will be made again."""
    kept = [record for record in read_lines(log_file) if record["step"] < step]
    if log_file.is_file():
        write_bytes(log_file, b"".join(json.dumps(record).encode() + b"\n" for record in kept))
