"""`average`: the mean of states of one run, or of any models of one shape.

    mean: {average: {models: [first, second, runs/old/checkpoint-400]}}
    tail: {average: {states: base, method: lawa, last: 20}}
    best: {average: {states: base, method: {sewa: {num_select: 5}}}}

`states` names a stage that keeps its states (`average: keep`). States are read tile by tile: many large ones
need no more memory than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.evaluation.costs import TORCH_BYTES
from weightsmith.evaluation.models import window_length
from weightsmith.merging import average, parse_merge, plan_merge
from weightsmith.recipes.stages.contract import (
    Done,
    Forecast,
    Problem,
    Reference,
    Workspace,
    plain,
)
from weightsmith.recipes.stages.merge_costs import LIGHT_BYTES, predict_merge
from weightsmith.recipes.stages.parts import METHODS, choice, read_method
from weightsmith.recipes.stages.scoring import trained_on
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.recipes.validation import validate
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.runs.speed import matmul_flops
from weightsmith.tensors.floats import FLOAT_DTYPES, parse_dtype
from weightsmith.training.averaged import average_states, fits_in_memory, seeded, thinned
from weightsmith.training.averaging.candidates import open_candidates, run_folders
from weightsmith.training.averaging.choice import by_rule
from weightsmith.training.averaging.options import LEARNED, AveragingOptions
from weightsmith.training.averaging.run import SELECTION_FILE, lineage_of, selection_bytes
from weightsmith.training.averaging.streaming import plan_average
from weightsmith.training.costs import learning_passes
from weightsmith.training.data import sources
from weightsmith.training.parts import StateAverage, changed

UNIFORM = StateAverage(options=AveragingOptions(method="uniform"))


@dataclass(frozen=True, kw_only=True)
class Average:
    """Keys of the stage."""

    models: tuple[str, ...] = ()
    """Stages, folders or hub ids, oldest first; two or more."""
    states: str | None = None
    """In place of `models`: a stage above that keeps its states."""
    last: int | None = None
    """The latest so many states; all by default."""
    every: int | None = None
    """Each so many-th state, counted back from the latest."""
    method: StateAverage = field(default_factory=lambda: UNIFORM)
    """`uniform`, `swa`, `ema`, `lawa`, `every`, `random`; by losses on held-out data `sewa`, `greedy`,
    `best`."""
    batch_size: int = 16
    """Windows of held-out data in a pass."""
    device: str = "auto"
    """Where losses are measured: `auto` (CUDA where there is one) or a torch device."""
    dtype: str | None = None
    """Of the output; that of the stage's own model, or of the first of `models`, by default."""

    kind: ClassVar[str] = "average"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Average | None, list[Problem]]:
        """The stage from its keys on the page, or every problem found."""
        rest = {key: value for key, value in body.items() if key != "method"}
        config, problems = validate(cls, rest)
        name, options, found = choice("method", body.get("method", "uniform"), METHODS)
        if found:
            return None, [*problems, *found]
        method, found = read_method(name, options)
        problems += [Problem(("method", name, *problem.keys), problem.text) for problem in found]
        if config is None or method is None or problems:
            return None, problems
        return replace(config, method=method), []

    @property
    def needs_torch(self) -> bool:
        """Losses are measured."""
        return self.method.options.method in LEARNED

    @property
    def needs_transformers(self) -> bool:
        """See `contract.Stage`."""
        return self.needs_torch

    def references(self) -> Sequence[Reference]:
        """The states, or the models."""
        if self.states is not None:
            return [Reference(("states",), self.states, "states")]
        return [Reference(("models", index), model) for index, model in enumerate(self.models)]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with values and data."""
        found = []
        if (self.states is not None) == bool(self.models):
            found.append(Problem((), "expected `states`, a stage that keeps its states, or `models`"))
        elif self.states is None and len(self.models) < 2:
            found.append(Problem(("models",), f"expected two models or more, found {len(self.models)}"))
        for key in ("last", "every", "batch_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                found.append(Problem((key,), f"expected at least 1, got {getattr(self, key)}"))
        try:
            if self.dtype is not None:
                parse_dtype(self.dtype)
        except InputError as wrong:
            found.append(Problem(("dtype",), str(wrong)))
        try:
            sources(self.method.held_out or "docs")
        except InputError as wrong:
            name = self.method.options.method
            found.append(Problem(("method", name, "held_out"), str(wrong).removeprefix("data ")))
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Average:
        """What losses are measured on, where the page leaves it open: what the models were trained on."""
        if not self.needs_torch or self.method.held_out is not None:
            return self
        trained = trained_on([reference.value for reference in self.references()], earlier)
        return replace(self, method=replace(self.method, held_out=trained or None))

    def identity(self) -> dict[str, Any]:
        """The values that decide the result."""
        options = changed(self.method.options)
        options |= options.pop("sewa", {})
        name = options.pop("method", "sewa")
        words = {key: value for key, value in plain(self).items() if key not in ("method", "device")}
        return {**words, "method": {name: options}, "held_out": plain(self.method.held_out)}

    def data_fingerprint(self) -> str:
        """Of the held-out data."""
        data = self.method.held_out
        return "\n".join(f"{entry!r}={entry.fingerprint()}" for entry in sources(data)) if data else ""

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost; exact but for the record of a choice that losses will make."""
        if self._is_merge:
            with plan_merge(parse_merge(self._page(models))) as plan:
                standin = write_standin(
                    workspace.checkpoint, plan.specs, side_files=plan.side_files, lineage=plan.lineage
                )
                cost = predict_merge(plan, diagnosed=False)
                return Forecast(prediction=cost, model=standin, warnings=plan.warnings)
        if self.needs_torch and self.method.held_out is None:
            raise InputError(
                f"method.{self.method.options.method}: measures losses; name `held_out`, data that is not "
                "reported on"
            )
        options = seeded(self.method, workspace.seed).options
        folders = self._folders(models)
        with ExitStack() as stack:
            checkpoints, steps = open_candidates(folders, self._steps)
            for checkpoint in checkpoints:
                stack.enter_context(checkpoint)
            # A choice by losses is not known yet; one by a rule is as large.
            rule = options if not self.needs_torch else replace(options, method="uniform")
            selection = by_rule(rule, steps)
            files = {SELECTION_FILE: selection_bytes(selection)}
            planned = plan_average(
                checkpoints,
                selection.weights,
                lineage_of(options, selection),
                files,
                self._dtype(folders, models),
            )
            standin = write_standin(
                workspace.checkpoint, planned.specs, side_files=planned.side_files, lineage=planned.lineage
            )
            read = sum(info.nbytes for checkpoint in checkpoints for info in checkpoint.tensors.values())
            parameters = sum(info.numel for info in checkpoints[-1].tensors.values())
            batch = self.batch_size * window_length(checkpoints[-1].config)
        memory, seconds = LIGHT_BYTES + 30_000_000, 0.5 + 2 * read / 1e9
        if self.needs_torch:
            passes = learning_passes(self.method, len(folders))
            seconds += passes * (6.0 * parameters * batch / (0.35 * matmul_flops()) + 2 * read / 1e9)
            memory = TORCH_BYTES + 12 * parameters
            memory += 4 * parameters * len(folders) if fits_in_memory(folders[-1], len(folders)) else 0
        data = self.method.held_out
        names = tuple(source.source for source in sources(data)) if data is not None else ()
        cost = Prediction(memory, folder_bytes(standin), seconds)
        return Forecast(prediction=cost, model=standin, reads=names)

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Choose, and write the mean."""
        if self._is_merge:
            folders = self._folders(models)
            average(folders, workspace.checkpoint, dtype=self.dtype, progress=progress, overwrite=True)
            return Done({"checkpoint": "checkpoint"}, self.identity())
        folders = self._folders(models)
        average_states(
            folders,
            workspace.checkpoint,
            self.method,
            steps=self._steps,
            dtype=self._dtype(folders, models),
            batch_size=self.batch_size,
            device=self.device,
            seed=workspace.seed,
            progress=progress,
            overwrite=True,
        )
        return Done({"checkpoint": "checkpoint"}, self.identity())

    @property
    def _is_merge(self) -> bool:
        """The uniform mean of models is `merge` with `linear`, which reads adapters and any layout too."""
        return self.states is None and self.method.options.method == "uniform"

    @property
    def _steps(self) -> list[int] | None:
        """Models are as old as the page lists them; states have their step in their name."""
        return None if self.states is not None else thinned(range(len(self.models)), self.last, self.every)

    def _folders(self, models: Mapping[str, Path]) -> list[str]:
        found = (
            run_folders(models[self.states], "step-*")
            if self.states is not None
            else [models[name] for name in self.models]
        )
        return [str(path) for path in thinned(found, self.last, self.every)]

    def _page(self, models: Mapping[str, Path]) -> dict[str, Any]:
        page: dict[str, Any] = {"method": "linear", "models": self._folders(models)}
        return page if self.dtype is None else {**page, "dtype": self.dtype}

    def _dtype(self, folders: Sequence[str], models: Mapping[str, Path]) -> str | None:
        """States are float32 whatever the run's own model is stored in."""
        if self.dtype is not None:
            return parse_dtype(self.dtype)
        own = folders[0] if self.states is None else models[self.states].parent / "checkpoint"
        with Checkpoint.open(own) as checkpoint:
            found = {info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOAT_DTYPES}
        return found.pop() if len(found) == 1 else None
