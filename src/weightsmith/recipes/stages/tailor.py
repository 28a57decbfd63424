"""`tailor`: a model with fewer layers, each from the base, from a fine-tune, or a blend of several.

    smaller: {tailor: {base: base, candidates: [code, english], sparsity: 0.25, trials: 60}}

Combinations are scored on calibration data of `tasks`: by default what the models were trained on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints import Ancestor, Checkpoint, Lineage, TensorSpec
from weightsmith.checkpoints.stacks import decoder_stack, restacked
from weightsmith.compression.tailoring.options import TailorOptions
from weightsmith.compression.tailoring.space import num_dropped
from weightsmith.errors import InputError
from weightsmith.evaluation.costs import LOAD_SECONDS, predict_scoring
from weightsmith.recipes.fingerprint import digest
from weightsmith.recipes.stages import scoring
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.stages.scoring import PageTasks, trained_on
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.recipes.validation import validate
from weightsmith.runs.atomic import write_json
from weightsmith.runs.environment import versions
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress

PLAN, TRIALS = "plan.json", "trials.json"
_CHARACTERS = 64
"""Of an example of text, about."""


@dataclass(frozen=True, kw_only=True)
class Tailor(TailorOptions):
    """Keys of the stage: those of `TailorOptions` (`trials` for `n_trials`), the models and the tasks."""

    base: str
    """A stage, folder or hub id."""
    candidates: tuple[str, ...] = ()
    """Fine-tunes of it; none for a search for layers to drop alone."""
    tasks: PageTasks | None = None
    """What combinations are scored on (calibration halves); by default what the models were trained on."""
    workers: int = 1
    """Trials at once, each in a process of its own; the outcome is the same."""
    ray: str | None = None
    """Workers on a Ray cluster instead: `auto`, `local` or HOST:PORT."""
    device: str = "auto"
    """Where models run: `auto` (CUDA where there is one) or a torch device."""
    seed: int | None = None  # pyrefly: ignore[bad-override]
    """Of everything random; by default the recipe's seed and the stage's name decide."""

    kind: ClassVar[str] = "tailor"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Tailor | None, list[Problem]]:
        """The stage from its keys on the page, or every problem found."""
        if "n_trials" in body:
            return None, [Problem(("n_trials",), "no such key; did you mean `trials`?")]
        words = {"n_trials" if key == "trials" else key: value for key, value in body.items()}
        stage, problems = validate(cls, words)
        return stage, [
            Problem(("trials", *problem.keys[1:]), problem.text)
            if problem.keys[:1] == ("n_trials",)
            else problem
            for problem in problems
        ]

    def references(self) -> Sequence[Reference]:
        """The base, then the fine-tunes."""
        named = [Reference(("candidates", index), model) for index, model in enumerate(self.candidates)]
        return [Reference(("base",), self.base), *named]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with numbers and tasks."""
        found = []
        if (self.sparsity is None) == (self.keep_layers is None):
            found.append(Problem((), "expected one of `sparsity` and `keep_layers`"))
        if self.workers < 1:
            found.append(Problem(("workers",), f"expected at least 1, got {self.workers}"))
        if self.tasks is not None:
            found += scoring.task_problems("tasks", self.tasks)
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Tailor:
        """Tasks, where the page leaves them open: what the models were trained on."""
        if self.tasks is not None:
            return self
        return dataclasses.replace(self, tasks=trained_on([self.base, *self.candidates], earlier) or None)

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        no_effect = ("device", "workers", "ray", "blend_cache_bytes", "prefix_cache_bytes")
        words = {key: value for key, value in plain(self).items() if key not in no_effect}
        return {"trials" if key == "n_trials" else key: value for key, value in words.items()}

    def data_fingerprint(self) -> str:
        """Of what combinations are scored on."""
        return digest(scoring.tasks_fingerprint(self.tasks)) if self.tasks is not None else ""

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost: trials at the rungs that brackets spend most of them on."""
        tasks = self._tasks()
        with ExitStack() as stack:
            opened = [
                stack.enter_context(Checkpoint.open(models[name])) for name in (self.base, *self.candidates)
            ]
            base = opened[0]
            layers = decoder_stack(base)
            kept = range(num_dropped(layers.depth, self.sparsity, self.keep_layers), layers.depth)
            names = [
                *(layers.name(number, rest) for number in kept for rest in layers.rest[number]),
                *layers.outside(list(base.tensors)),
            ]
            specs = [TensorSpec(name, base.tensors[name].dtype, base.tensors[name].shape) for name in names]
            config, _ = restacked(base.config, list(kept), layers.depth)
            files = {**base.side_file_map(), "config.json": json.dumps(config, indent=2).encode()}
            roles = ["base", *["model"] * len(self.candidates)]
            ancestors = tuple(Ancestor.of(one, role) for one, role in zip(opened, roles, strict=True))
            parameters = sum(info.numel for info in base.tensors.values())
        lineage = Lineage(method="gptailor", inputs=ancestors, versions=versions())
        standin = write_standin(workspace.checkpoint, specs, side_files=files, lineage=lineage)
        budget = self.rungs()[0]
        scored = predict_scoring(models[self.base], tasks, budget * _CHARACTERS, budget)
        share = sum(spec.numel for spec in specs) / max(parameters, 1)
        each = max(0.0, scored.seconds - LOAD_SECONDS) * share
        cost = Prediction(
            memory_bytes=scored.memory_bytes
            + 4 * parameters * len(self.candidates)
            + min(self.blend_cache_bytes, 4 * parameters * self.n_trials)
            + min(self.prefix_cache_bytes, self._prefix_bytes(tasks, config, len(kept))),
            disk_bytes=folder_bytes(standin),
            seconds=LOAD_SECONDS * (1 + len(self.candidates)) + self.n_trials * each / self.workers,
        )
        return Forecast(prediction=cost, model=standin, reads=scoring.names(tasks))

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Search, going on from the trials of a killed attempt, and write the chosen model."""
        from weightsmith.compression.tailoring.search import TailorSearch

        options = self.search_options(workspace.seed)
        search = TailorSearch(
            models[self.base],
            [models[name] for name in self.candidates],
            tasks=self._tasks(),
            work=workspace.work,
            num_workers=self.workers,
            ray=self.ray,
            device=self.device,
            progress=progress,
            **options,
        )
        plan = search.run()
        # An attempt killed after its rename left a whole checkpoint; it is written again, the same.
        plan.save_pretrained(workspace.checkpoint, overwrite=True, progress=progress)
        plan.save(workspace.folder / PLAN)
        write_json(workspace.folder / TRIALS, [trial.summary() for trial in search.trials])
        outputs = {"checkpoint": "checkpoint", "plan": PLAN, "trials": TRIALS}
        return Done(outputs, {**self.identity(), "seed": options["seed"]})

    def _prefix_bytes(self, tasks: PageTasks, config: Mapping[str, Any], depth: int) -> int:
        """Activations after each layer, of every trial at the lowest budget."""
        text = config.get("text_config") or config
        tokens = len(scoring.names(tasks)) * self.rungs()[0] * _CHARACTERS
        return self.n_trials * depth * tokens * 4 * int(text.get("hidden_size") or text.get("n_embd") or 1024)

    def search_options(self, seed: int) -> dict[str, Any]:
        """The fields of `TailorOptions`; `seed` where the page gives none."""
        options = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(TailorOptions)}
        return {**options, "seed": seed if self.seed is None else self.seed}

    def _tasks(self) -> Any:
        if self.tasks is None:
            raise InputError(
                "tasks: no stage above says what the models were trained on; name tasks, files or functions"
            )
        return self.tasks
