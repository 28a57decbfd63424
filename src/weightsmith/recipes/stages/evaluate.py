"""`evaluate`: models x tasks on held-out data.

    scores: {evaluate: {models: [base, merged], tasks: all}}

`tasks: all` are the test-bed tasks that the models, or the stages they come from, were trained on; where that
is unknown, every domain and skill of the bed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from weightsmith.evaluation.costs import predict_scoring
from weightsmith.recipes.stages import scoring
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.stages.scoring import PageTasks
from weightsmith.runs.atomic import append_line, read_lines, write_json
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Keys of the stage."""

    models: tuple[str, ...]
    """Stages, folders or hub ids."""
    tasks: PageTasks = "all"
    """Test-bed tasks and sets, files, `lm_eval:TASK`, `module:function`; `all` for what the models were
    trained on."""
    split: Literal["test", "calibration"] = "test"
    """Which held-out half of the test-bed."""
    characters: int = 20_000
    """Held-out characters of each domain, about."""
    items: int = 400
    """Questions of each skill."""
    batch_size: int | None = None
    """Windows or questions at once; by default as many as are fast and keep the logits small."""
    device: str = "auto"
    """`auto` (CUDA where there is one) or a torch device."""

    kind: ClassVar[str] = "evaluate"
    makes_model: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True

    def references(self) -> Sequence[Reference]:
        """See `contract.Stage`."""
        return [Reference(("models", index), model) for index, model in enumerate(self.models)]

    def problems(self) -> Sequence[Problem]:
        """See `contract.Stage`."""
        found = []
        if not self.models:
            found.append(Problem(("models",), "expected at least one model, found none"))
        for index, model in enumerate(self.models):
            if model in self.models[:index]:
                found.append(Problem(("models", index), f"`{model}` is listed twice"))
        for key in ("characters", "items", "batch_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                found.append(Problem((key,), f"expected at least 1, got {getattr(self, key)}"))
        found += scoring.task_problems("tasks", self.tasks)
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Evaluate:
        """`tasks: all` by name."""
        if self.tasks != "all":
            return self
        trained = scoring.trained_on(self.models, earlier)
        return replace(self, tasks=trained) if trained else self

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        return plain(self)

    def data_fingerprint(self) -> str:
        """Of the files, functions and test-bed tasks."""
        return scoring.tasks_fingerprint(self.tasks)

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """See `contract.Stage`."""
        names = scoring.names(self.tasks)
        costs = [
            predict_scoring(models[name], self.tasks, self.characters, self.items) for name in self.models
        ]
        prediction = Prediction(
            memory_bytes=max(cost.memory_bytes for cost in costs),
            disk_bytes=120 * len(names) * len(self.models),
            seconds=sum(cost.seconds for cost in costs),
        )
        return Forecast(prediction=prediction, reads=names)

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Score model by model; those scored before a kill are not scored again."""
        from weightsmith.evaluation import check_tasks, evaluate

        done = workspace.work / "scores.jsonl"
        scores = {line["model"]: line["scores"] for line in read_lines(done)}
        names = scoring.names(self.tasks)
        progress.start("scoring", len(self.models) * len(names), "tasks")
        for name in self.models:
            if name in scores:
                progress.advance(len(names))
                continue
            found = evaluate(
                models[name],
                check_tasks(self.tasks),
                self.split,
                characters=self.characters,
                items=self.items,
                batch_size=self.batch_size,
                device=self.device,
                progress=scoring.Within(progress),
            )
            scores[name] = {task: score.to_json() for task, score in found.items()}
            append_line(done, {"model": name, "scores": scores[name]})
        progress.done()
        ordered = {name: scores[name] for name in self.models}
        write_json(workspace.folder / SCORES, {"split": self.split, "models": ordered, "tasks": list(names)})
        return Done({"scores": SCORES}, plain(self))
