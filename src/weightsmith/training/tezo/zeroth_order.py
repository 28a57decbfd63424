"""Steps from two losses of each batch: probes along a direction, weights that are safe in between.

    probe    W + rho Z, loss; W - rho Z, loss of the same batch with the same random numbers
    step     from there back to W and along Z, in one sweep

What Z is and what the variants make of it, `pieces.py` and `low_rank.py` say. Weights come back after an
exception, a loss that is not finite, and a probe without a step. State holds no weights and no directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.lightsam.replay import (
    RandomState,
    random_state,
    running_statistics_kept,
    set_random_state,
)
from weightsmith.training.names import named_parameters, plain_name
from weightsmith.training.sharded import local
from weightsmith.training.tezo.advice import Advice
from weightsmith.training.tezo.layout import Moving, check_state, make_pieces, moving
from weightsmith.training.tezo.losses import NEEDS_CLOSURE, ZerothOrderStats, agreed, loss_of
from weightsmith.training.tezo.low_rank import CPPiece
from weightsmith.training.tezo.noise import hashed
from weightsmith.training.tezo.options import (
    RATES,
    LOZOOptions,
    TeZOOptions,
    ZerothOrderOptions,
    check_group,
    check_rates,
)
from weightsmith.training.tezo.pieces import Piece
from weightsmith.training.tezo.shares import check_sharded, drop_gathered
from weightsmith.training.tezo.states import Run, check_run, run_of
from weightsmith.training.tezo.sweeps import Sweeps, uninterrupted


class ZerothOrder(torch.optim.Optimizer):
    """What TeZO, MeZO and LOZO share: probes, steps, and weights that are safe in between.

    Args:
        params: As for any optimiser; `model.named_parameters()` keys the directions by name, otherwise places
            do. Groups may have their own `lr`, `rho`, `weight_decay` and, but for MeZO, `rank`.
        lr: Learning rate; by default one for models of a billion weights.
        options: All else.
        weight_decay: Decoupled decay of what has at least two axes.
        maximize: Climb instead of descend.
        model: Where `restore="branch"` finds the modules of matrices; its batch normalisation keeps its
            running statistics out of the second probe. Needed where it is sharded (FSDP2, TeZO only).
        process_group: Processes that train the same weights and see different data; "auto" takes all, where
            torch.distributed runs, None this one alone. They exchange one short row of numbers a step.
        save_factors: Put factors into state dicts; otherwise they are drawn again.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None,
        options: ZerothOrderOptions,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        model: nn.Module | None = None,
        process_group: Any = "auto",
        save_factors: bool = False,
    ) -> None:
        lr = RATES[options.variant] if lr is None else lr
        check_rates({"lr": lr, "weight_decay": weight_decay})
        self.options = options
        self.maximize = maximize
        self.save_factors = save_factors
        self.last = ZerothOrderStats()
        self.skipped_steps = 0
        self._group = process_group
        self._sweeps: Sweeps | None = None
        self._names: dict[int, str] = {}
        self._model = model
        self._advice = Advice(self._name)
        self.forget_probes()
        self._trained: list[bool] = []
        self._gathers: nn.Module | None = None
        defaults = {"lr": lr, "rho": options.rho, "weight_decay": weight_decay}
        defaults["decoupled_weight_decay"] = True
        super().__init__(params, {**defaults, "step": 0, "seed": options.seed or 0})
        self.name_parameters(named_parameters(self, self._name))
        members = self._moving()
        low_rank = isinstance(options, TeZOOptions | LOZOOptions)
        if low_rank and all(member.matrices is None for member in members):
            self._advice.tell("matrices", "no matrix is trained, so this is MeZO")
        if options.restore == "branch" and model is not None:
            self.attach(model)

    # What a user calls.

    def probe(self, closure: Callable[[], Any], *, weight: float = 1.0) -> float:
        """Measure the derivative along the step's direction on one batch; the weights come back.

        Call it for each micro-batch, then `step()`: the direction stays, the derivatives are averaged.

        Args:
            closure: Runs forward, returns the loss: a number, or a tensor with one. Called twice, without
                autograd.
            weight: What the batch counts among the others of this step, over all processes (its tokens,
                where the loss is their mean).

        Returns:
            The derivative on this batch.

        Raises:
            InputError: no closure, a loss that is no number, or a closure that calls backward().
        """
        with torch.no_grad():
            try:
                difference = self._measure(closure, weight)
            finally:
                self._go(0)
        return difference / (2 * self.param_groups[0]["rho"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:  # pyrefly: ignore
        """Probe with a closure and step; or, without one, the step of the probes before.

        Whatever fails, no weight is left at a probe. Where memory runs out in the middle of the last sweep,
        some weights have made their step and others not.

        Args:
            closure: As for `probe`.
            weight: As for `probe`.

        Returns:
            The loss, float64 0-d: mean of the two probes, over all processes.

        Raises:
            InputError: neither a closure nor a probe before; as `probe`; processes that differ in method,
                options, rates, step or parameters.
        """
        try:
            return self._step(closure, weight)
        except BaseException:
            self._go(0)
            raise

    def attach(self, model: nn.Module) -> None:
        """Take the names of a model's parameters, and its modules for `restore="branch"`."""
        self._model = model
        self.name_parameters(model.named_parameters())

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Key directions by these names; before the first step, as other names give other directions."""
        ours = set(map(id, self._parameters()))
        self._names |= {id(parameter): plain_name(name) for name, parameter in named if id(parameter) in ours}
        self._sweeps = None

    @property
    def step_count(self) -> int:
        """Steps so far, skipped ones included."""
        return self.param_groups[0]["step"]

    def pieces(self) -> list[Piece]:
        """Parameters in training with their directions."""
        self._follow()
        return [piece for piece, _, _ in self._prepared().members]

    def is_branched(self, piece: Piece) -> bool:
        """Whether probes leave this parameter alone and add to what its modules return."""
        return self._prepared().is_branched(self.parameter_of(piece))

    def name_of(self, parameter: Tensor) -> str:
        """The name that keys a parameter's directions."""
        return self._names[id(parameter)]

    def parameter_of(self, piece: Piece) -> Tensor:
        """The parameter that a piece moves."""
        return next(parameter for other, _, parameter in self._prepared().members if other is piece)

    def state_dict(self) -> dict[str, Any]:
        """State, groups and what they depend on; factors only with `save_factors`."""
        saved = super().state_dict()
        saved["run"] = self._run() | {"skipped_steps": self.skipped_steps}
        if not self.save_factors or self._sweeps is None:
            return saved
        places = {id(p): i for i, p in enumerate(self._parameters())}
        saved["state"] = {key: dict(entry) for key, entry in saved["state"].items()}
        for piece, _, parameter in self._sweeps.members:
            if isinstance(piece, CPPiece) and piece.epoch is not None:
                saved["state"][places[id(parameter)]] |= {"u": piece.u, "v": piece.v}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; the next step is the one that would have followed. Probes that no step has
        followed are forgotten.

        Raises:
            InputError: a state of another method or scale, or of parameters with other names, shapes or
                ranks; nothing was loaded.
        """
        parameters, members = self._parameters(), self._moving()
        try:
            check_run(state_dict, self._run())
            places = [key for group in state_dict["param_groups"] for key in group["params"]]
            saved = [state_dict["state"].get(key, {}) for key in places]
            entries = {id(p): entry for p, entry in zip(parameters, saved, strict=True)}
            check_state(members, entries, self.options)
        except InputError as wrong:
            raise InputError(f"{self._name}: {wrong}") from wrong
        super().load_state_dict(state_dict)
        for parameter, entry in zip(parameters, saved, strict=True):
            for name, value in entry.items():
                if isinstance(value, Tensor):  # torch would cast it to the parameter's dtype
                    self.state[parameter][name] = value.to(device=parameter.device, copy=True)
        self.skipped_steps = state_dict["run"]["skipped_steps"]
        self.forget_probes()
        self._sweeps = None

    def forget_probes(self) -> None:
        """Drop probes that no step has followed."""
        self._sums = [0.0, 0.0, 0.0]

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copying and pickling, of which torch keeps no more than the groups.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self._name}: can't be copied or pickled, as its directions belong to its model's parameters; "
            "make one for the other model and load this one's state_dict()"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between steps.

        Raises:
            InputError: a key that groups don't have, or a value out of range.
        """
        try:
            check_group(param_group, self.options)
        except InputError as wrong:
            raise InputError(f"{self._name}: parameter group {len(self.param_groups)}: {wrong}") from wrong
        super().add_param_group(dict(param_group))  # torch writes its defaults into the user's
        if self._names:
            self.param_groups[-1]["step"] = self.step_count
            start = sum(len(group["params"]) for group in self.param_groups[:-1])
            self.name_parameters(named_parameters([self.param_groups[-1]], self._name, start))

    # How it works.

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _prepared(self) -> Sweeps:
        """Pieces with their groups and parameters; made anew after anything about parameters has changed."""
        if self._sweeps is None:
            members = self._moving()
            # An entry for each: what a piece puts into its own is the optimiser's state.
            states = {member.parameter: self.state[member.parameter] for member in members}
            pieces = make_pieces(members, states, self.options)
            triples = [(p, m.group, m.parameter) for p, m in zip(pieces, members, strict=True)]
            self._sweeps = Sweeps(triples, self.options, self._model)
            self._trained = self._trainable()
            shapes = ((piece.name, tuple(piece.whole_shape), getattr(piece, "rank", 0)) for piece in pieces)
            options = replace(self.options, seed=self.param_groups[0]["seed"])
            self._fingerprint = hashed(options, self.maximize, *shapes)
            if not self.step_count:
                self._advice.on_rho(triples)
                self._advice.on_dropout(self._model)
        return self._sweeps

    def _moving(self) -> list[Moving]:
        try:
            members = moving(self.param_groups, self._names, self.options)
            sharded = next((member.name for member in members if member.share is not None), None)
            if sharded:
                check_sharded(sharded, self._model, self.save_factors)
        except InputError as wrong:
            raise InputError(f"{self._name}: {wrong}") from wrong
        self._gathers = self._model if sharded else None
        return members

    def _follow(self) -> None:
        """Notice parameters that live elsewhere now (moved to a device, cast, exchanged), were frozen or are
        trained again.
        """
        if self._sweeps is None or self._sweeps.is_away:
            return  # what is away must find its way back first
        if self._trained != self._trainable() or any(
            piece.value.data_ptr() != local(parameter).data_ptr() or piece.value.dtype != parameter.dtype
            for piece, _, parameter in self._sweeps.members
        ):
            self._sweeps = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _trainable(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters()]

    def _run(self) -> Run:
        return run_of([(self._names[id(p)], p) for p in self._parameters()], self.options)

    def _step(self, closure: Callable[[], Any] | None, weight: float) -> Tensor:
        if closure is not None:
            if self._sums[2]:
                raise InputError(f"{self._name}: step(closure) after probe(); step() ends what probes began")
            self._measure(closure, weight)
        elif not self._sums[2]:
            raise InputError(f"{self._name} {NEEDS_CLOSURE}, or probe() before")
        try:
            device = self._prepared().members[0][2].device
            difference, loss = agreed(self._sums, self._mark(), self._group, device, self._name)
        finally:
            self.forget_probes()
        kappa = difference / (2 * self.param_groups[0]["rho"])
        skipped = not (math.isfinite(difference) and math.isfinite(loss))
        with uninterrupted():
            if skipped:
                self._go(0)
                self.skipped_steps += 1
                self._advice.tell("skip", "a loss is not finite; the step is skipped")
            else:
                self._advice.on_difference(difference, self.param_groups[0]["rho"])
                self._prepared().update(self.step_count, difference, self.maximize)
                drop_gathered(self._gathers)
            for group in self.param_groups:
                group["step"] += 1
        self.last = ZerothOrderStats(loss, kappa, skipped)
        return torch.tensor(loss, dtype=torch.float64)

    def _measure(self, closure: Callable[[], Any], weight: float) -> float:
        """Both probes of one batch, added to the sums; leaves the weights at the second. Returns what their
        losses differ by.
        """
        if not callable(closure):
            raise InputError(f"{self._name} {NEEDS_CLOSURE}")
        if not 0 < weight < math.inf:
            raise InputError(f"{self._name}: weight: expected above 0 and finite, got {weight}")
        for group in self.param_groups:  # schedules and users change them
            check_rates(group)
        self._follow()
        devices = {parameter.device for _, _, parameter in self._prepared().members}
        before = random_state(devices) if self.options.replay_rng else None
        self._go(1)
        above = self._value(closure)
        if missed := self._prepared().release(self.step_count):
            self._advice.tell(
                "branch",
                f"{len(missed)} matrices are read by more than their Linear and Embedding modules, or not by "
                f"them ({missed[0]}); they are copied and put back",
            )
            above = self._again(1, closure, before)
        below = self._again(-1, closure, before)
        upper, lower = float(above), float(below)
        for place, value in enumerate((upper - lower, (upper + lower) / 2, 1.0)):
            self._sums[place] += weight * value
        return upper - lower

    def _again(self, target: int, closure: Callable[[], Any], before: RandomState | None) -> Tensor | float:
        """The loss of the same batch elsewhere, with the same random numbers."""
        if before is not None:
            set_random_state(before)
        self._go(target)
        with running_statistics_kept(self._model):
            return self._value(closure)

    def _value(self, closure: Callable[[], Any]) -> Tensor | float:
        """The closure's loss, still on its device."""
        with self._prepared().probe():
            return loss_of(closure, self._name, self._advice.tell)

    def _go(self, target: int) -> None:
        """Move the weights to `target` times rho times the direction."""
        if self._sweeps is None and not target:
            return
        try:
            self._prepared().go(self.step_count, target)
        except InputError as wrong:
            raise InputError(f"{self._name}: {wrong}") from wrong
        drop_gathered(self._gathers)

    def _mark(self) -> float:
        """Stands for what processes must have in common; a whole number that float64 holds."""
        rates = ([float(group[key]) for key in ("lr", "rho", "weight_decay")] for group in self.param_groups)
        return float(hashed(self._fingerprint, self.step_count, *rates) >> 12)
