"""What the stages `train` and `finetune` share: their data as a page writes it, their run, their forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.errors import InputError
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.stages.parts import read_parts
from weightsmith.recipes.standin import write_standin
from weightsmith.recipes.validation import validate
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.parts import described, kept_steps
from weightsmith.training.states import state_folder, state_lineage, state_specs

METRICS, STATES = "metrics.jsonl", "states"
# Written beside the metrics by the loop.
ALPHADECAY, SELECTION, ADAPTER = "alphadecay.jsonl", "selection.json", "adapter"
# How often a run becomes durable changes nothing in its result.
_NO_EFFECT = ("save_every", "keep_checkpoints")
# Resident set of a process forked from one that has imported torch and transformers, without what grows with
# the model. Less than that of a process which imports them itself, as `training.plan` assumes.
FORKED_BYTES = 440_000_000


class TrainingStage:
    """The methods of `contract.Stage` for a config that has the fields of `TrainConfig` and `model`."""

    makes_model: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True
    settled: ClassVar[tuple[str, ...]] = ()
    """Keys of other training stages that this one has no choice in."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
        """The stage from its keys on the page, or every problem found."""
        values, problems = read_parts({key: value for key, value in body.items() if key not in cls.settled})
        if "max_grad_norm" in body:  # what the Trainer calls it
            return None, [*problems, Problem(("max_grad_norm",), "no such key; write `clip: {global: 1.0}`")]
        config, more = validate(cls, {key: value for key, value in body.items() if key not in values})
        if problems or config is None:
            return None, [*problems, *more]
        return replace(config, **values), more  # pyrefly: ignore[bad-specialization]

    @property
    def keeps_states(self: Any) -> bool:
        """Whether an `average` below can read its states."""
        return self.average is not None and self.average.keep

    def seed_in(self: Any, workspace: Workspace) -> int:
        """The page's own seed, or the one derived from the recipe's and the stage's name."""
        return workspace.seed if self.seed is None else derive(self.seed, "stage")

    def references(self: Any) -> Sequence[Reference]:
        """The one model."""
        return [Reference(("model",), self.model)]

    def problems(self: Any) -> Sequence[Problem]:
        """What is wrong with values and data; each entry of a list of data is told at its own line."""
        from weightsmith.training.data import sources

        if self.seed is not None and self.seed < 0:
            return [Problem(("seed",), f"expected a whole number from 0 on, found {self.seed}")]
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
        return {key: value for key, value in as_record(self).items() if key not in _NO_EFFECT}

    def forecast(self: Any, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Cost of the training, and its checkpoint to come."""
        from weightsmith.training import plan
        from weightsmith.training.costs import PROCESS_BYTES
        from weightsmith.training.data import sources

        planned = plan(self, models.get(self.model, self.model), seed=self.seed_in(workspace))
        standin = write_standin(
            workspace.checkpoint, planned.specs, side_files=planned.side_files, lineage=planned.lineage
        )
        average = planned.config.average
        if average is not None and average.keep:
            for step in kept_steps(average.options, planned.config.steps):
                write_standin(
                    state_folder(workspace.folder / STATES, step),
                    state_specs(planned.specs),
                    side_files=planned.side_files,
                    lineage=state_lineage(planned.lineage, step),
                )
        read = [*sources(planned.config.data)]
        for more in (planned.config.replay_data, average.held_out if average is not None else None):
            read += sources(more) if more is not None else ()
        names = tuple(dict.fromkeys(source.source for source in read))
        cost = planned.prediction
        cost = replace(cost, memory_bytes=cost.memory_bytes - PROCESS_BYTES + FORKED_BYTES)
        return Forecast(prediction=cost, model=standin, reads=names, warnings=planned.warnings)

    def run(self: Any, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Train, going on from the last durable step of a killed attempt."""
        from weightsmith.training import plan

        model = models.get(self.model, self.model)
        self.start(
            model,
            workspace.checkpoint,
            workdir=workspace.work,
            seed=self.seed_in(workspace),
            metrics=workspace.folder / METRICS,
            states=workspace.folder / STATES,
            progress=progress,
            # An attempt killed after its last rename left a whole checkpoint; it is written again, the same.
            overwrite=True,
        )
        outputs = {"checkpoint": "checkpoint", "metrics": METRICS}
        if self.decay is not None:
            outputs["alphadecay"] = ALPHADECAY
        if self.keeps_states:
            outputs["states"] = STATES
        elif self.average is not None:
            outputs["selection"] = SELECTION
        if self.adapter is not None and self.adapter.keeps_base:
            outputs["adapter"] = ADAPTER
        return Done(outputs, as_record(plan(self, model, seed=self.seed_in(workspace)).config))


def as_record(config: Any) -> dict[str, Any]:
    """A config as JSON, its parts in the words of a page."""
    words = plain(config) | described(config)
    if config.average is not None:
        words["held_out"] = plain(config.average.held_out)
    return words
