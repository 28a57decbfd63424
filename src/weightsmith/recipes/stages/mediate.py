"""`mediate`: fine-tunes of one base into one model that averages where they agree and routes where they
don't.

    mediated:
      mediate: {base: base, experts: [code, names], n_routed: 2, expert_density: 0.1}

The router learns from prompts of what each expert was trained on: of the calibration pools for tasks of the
test-bed, or as `prompts` says. `evaluate` scores the model with the router in charge.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints.folder import label
from weightsmith.errors import InputError
from weightsmith.evaluation.costs import TORCH_BYTES
from weightsmith.evaluation.models import window_length
from weightsmith.merging.mediator import MediatorConfig, build_mediator
from weightsmith.merging.mediator.build import foreseen
from weightsmith.recipes.fingerprint import digest
from weightsmith.recipes.stages import scoring
from weightsmith.recipes.stages.contract import (
    Done,
    Forecast,
    Problem,
    Reference,
    Workspace,
    plain,
)
from weightsmith.recipes.stages.scoring import PageTasks
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.registry import cards
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.runs.speed import matmul_flops

PLAN = "plan.json"
# Reading, choosing and packing an entry of one model, per core.
_ENTRY_SECONDS = 12e-9


@dataclass(frozen=True, kw_only=True)
class Mediate(MediatorConfig):
    """Keys of the stage: those of `MediatorConfig`, the models, and what the router learns from."""

    base: str
    """A stage, folder or hub id: what the experts were tuned from."""
    experts: Mapping[str, str] | tuple[str, ...]
    """Stages, folders or hub ids; a mapping from task to model, or a list."""
    prompts: Mapping[str, PageTasks] = field(default_factory=dict)
    """For each task what its prompts are taken from: test-bed tasks or files; by default what the expert's
    stage trains on."""
    prompts_per_task: int = 64
    """Prompts of each task that the router learns from."""
    device: str = "auto"
    """Where the model runs to see them: `auto` (CUDA where there is one) or a torch device."""
    seed: int | None = None  # pyrefly: ignore[bad-override]
    """Of `select: random`; by default the recipe's seed and the stage's name decide."""

    kind: ClassVar[str] = "mediate"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True

    def references(self) -> Sequence[Reference]:
        """The base, then the experts."""
        if isinstance(self.experts, Mapping):
            named = [Reference(("experts", task), model) for task, model in self.experts.items()]
        else:
            named = [Reference(("experts", index), model) for index, model in enumerate(self.experts)]
        return [Reference(("base",), self.base), *named]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with names, numbers and prompts."""
        found = []
        if len(self.experts) < 2:
            found.append(Problem(("experts",), f"expected at least 2 fine-tunes, found {len(self.experts)}"))
        if len(self._named) < len(self.experts):
            found.append(Problem(("experts",), "two experts have one name; give a mapping {task: model}"))
        if self.prompts_per_task < 8:
            text = f"expected at least 8, fewer can't be calibrated; got {self.prompts_per_task}"
            found.append(Problem(("prompts_per_task",), text))
        if self.average not in [card.id for card in cards("merging")]:
            found.append(Problem(("average",), f"no merge method `{self.average}`"))
        for task, tasks in self.prompts.items():
            if task not in self._named:
                known = ", ".join(self._named)
                found.append(Problem(("prompts", task), f"no expert of that name; known: {known}"))
            for problem in scoring.task_problems(task, tasks):
                found.append(Problem(("prompts", *problem.keys), problem.text))
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Mediate:
        """Prompts of what each expert's stage trains on."""
        found: dict[str, PageTasks] = dict(self.prompts)
        for task, model in self._named.items():
            trained = getattr(earlier.get(model), "trains_on", tuple)()
            if task not in found and trained:
                found[task] = trained
        return dataclasses.replace(self, prompts=found)

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        return {key: value for key, value in plain(self).items() if key != "device"}

    def data_fingerprint(self) -> str:
        """Of what the prompts are taken from."""
        return digest({task: scoring.tasks_fingerprint(tasks) for task, tasks in self.prompts.items()})

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost; the size is that of as many routed blocks as there can be."""
        self._check_prompts()
        expected = foreseen(models[self.base], self._folders(models), self._config(workspace))
        standin = write_standin(
            workspace.checkpoint,
            expected.specs,
            side_files=expected.side_files,
            lineage=expected.lineage,
        )
        parameters = sum(spec.numel for spec in expected.specs)
        tokens = len(self._named) * self.prompts_per_task * window_length(expected.config) // 2
        work = _ENTRY_SECONDS * parameters * (len(self._named) + 1)
        cost = Prediction(
            memory_bytes=TORCH_BYTES + 8 * parameters,
            disk_bytes=folder_bytes(standin) + expected.expert_bytes,
            seconds=1.0 + work + 2.0 * parameters * tokens / (0.35 * matmul_flops()),
        )
        read = dict.fromkeys(name for tasks in self.prompts.values() for name in scoring.names(tasks))
        return Forecast(prediction=cost, model=standin, reads=tuple(read), warnings=expected.warnings)

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Build the model, then fit its router."""
        from weightsmith.evaluation import check_tasks, prompts
        from weightsmith.evaluation.models import choose_device
        from weightsmith.merging.mediator import Mediator

        self._check_prompts()
        out, config = workspace.checkpoint, self._config(workspace)
        made = build_mediator(
            models[self.base],
            self._folders(models),
            out,
            config,
            progress=progress,
            # An attempt killed before its router was fitted left a whole folder; it is written again, the
            # same.
            overwrite=True,
        )
        made.plan.save(workspace.folder / PLAN)
        mediated = Mediator.from_pretrained(out, device=choose_device(self.device), dtype="float32")
        length = window_length(mediated.config.to_dict())
        learnt = {
            task: prompts(check_tasks(tasks), mediated.tokenizer, self.prompts_per_task, length=length)
            for task, tasks in self.prompts.items()
        }
        progress.start("router", float(len(learnt)), "tasks")
        mediated.fit_router(learnt, seed=workspace.seed)
        mediated.save_router()
        mediated.close()
        progress.done()
        record = {**self.identity(), "seed": config.seed}
        return Done({"checkpoint": "checkpoint", "plan": PLAN}, record)

    @property
    def _named(self) -> dict[str, str]:
        """Task -> the page's word for its model."""
        if isinstance(self.experts, Mapping):
            return dict(self.experts)
        plain_name = re.compile(r"[\w.-]+")
        return {word if plain_name.fullmatch(word) else label(Path(word)): word for word in self.experts}

    def _folders(self, models: Mapping[str, Path]) -> dict[str, Path]:
        return {task: models[word] for task, word in self._named.items()}

    def _config(self, workspace: Workspace) -> MediatorConfig:
        options: dict[str, Any] = {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(MediatorConfig)
        }
        options["seed"] = workspace.seed if self.seed is None else self.seed
        return MediatorConfig(**options)

    def _check_prompts(self) -> None:
        for task, word in self._named.items():
            if task not in self.prompts:
                raise InputError(
                    f"prompts: no stage above says what `{word}` was trained on; name tasks or a file for "
                    f"`{task}`"
                )
