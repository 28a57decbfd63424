"""What the stages `train` and `finetune` share: their data as a page writes it, their run, their forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.errors import InputError
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.standin import write_standin
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.training import DataSource

METRICS = "metrics.jsonl"
# How often a run becomes durable changes nothing in its result.
_NO_EFFECT = ("save_every", "keep_checkpoints")
# Resident set of a process forked from one that has imported torch and transformers, without what grows with
# the model. Less than that of a process which imports them itself, as `training.plan` assumes.
FORKED_BYTES = 440_000_000


@dataclass(frozen=True, kw_only=True)
class Source(DataSource):
    """A source of data as a page writes it: unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


PageData = str | Source | tuple[str | Source, ...]


class TrainingStage:
    """The methods of `contract.Stage` for a config that has the fields of `TrainConfig` and `model`."""

    makes_model: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True

    def references(self: Any) -> Sequence[Reference]:
        """The one model."""
        return [Reference(("model",), self.model)]

    def problems(self: Any) -> Sequence[Problem]:
        """What is wrong with values and data; each entry of a list of data is told at its own line."""
        from weightsmith.training.data import sources

        found = []
        for key in ("data", "replay_data"):
            data = getattr(self, key)
            for index, entry in enumerate(data if isinstance(data, tuple) else ()):
                try:
                    sources(entry)
                except InputError as wrong:
                    found.append(Problem((key, index), str(wrong).removeprefix("data ")))
        if found:
            return found
        try:
            self.check()
        except InputError as wrong:
            key, _, text = str(wrong).partition(" " if str(wrong).startswith("data ") else ": ")
            return [Problem((key,), text) if hasattr(self, key) else Problem((), str(wrong))]
        return []

    def completed(self: Any, earlier: Mapping[str, Any]) -> Any:
        """What to replay, where the page leaves it to the stage that made the model."""
        data = getattr(earlier.get(self.model), "data", None)
        if not self.replay or self.replay_data is not None or data is None:
            return self
        return replace(self, replay_data=data)

    def trains_on(self: Any) -> tuple[str, ...]:
        """Names of the test-bed tasks among its data, replayed ones not counted."""
        from weightsmith.training.data import sources

        return tuple(source.source for source in sources(self.data) if source.kind == "testbed")

    def identity(self) -> dict[str, Any]:
        """The values that decide the result."""
        return {key: value for key, value in plain(self).items() if key not in _NO_EFFECT}

    def forecast(self: Any, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Cost of the training, and its checkpoint to come."""
        from weightsmith.training import plan
        from weightsmith.training.data import sources
        from weightsmith.training.planning import PROCESS_BYTES

        planned = plan(self, models.get(self.model, self.model), seed=workspace.seed)
        standin = write_standin(
            workspace.checkpoint, planned.specs, side_files=planned.side_files, lineage=planned.lineage
        )
        read = [*sources(planned.config.data)]
        if planned.config.replay_data is not None:
            read += sources(planned.config.replay_data)
        names = tuple(dict.fromkeys(source.source for source in read))
        cost = planned.prediction
        memory = cost.memory_bytes - PROCESS_BYTES + FORKED_BYTES
        prediction = Prediction(memory, cost.disk_bytes, cost.seconds)
        return Forecast(prediction=prediction, model=standin, reads=names)

    def run(self: Any, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Train, going on from the last durable step of a killed attempt."""
        from weightsmith.training import plan

        model = models.get(self.model, self.model)
        self.start(
            model,
            workspace.checkpoint,
            workdir=workspace.work,
            seed=workspace.seed,
            metrics=workspace.folder / METRICS,
            progress=progress,
            # An attempt killed after its last rename left a whole checkpoint; it is written again, the same.
            overwrite=True,
        )
        resolved = plain(plan(self, model, seed=workspace.seed).config)
        return Done({"checkpoint": "checkpoint", "metrics": METRICS}, resolved)
