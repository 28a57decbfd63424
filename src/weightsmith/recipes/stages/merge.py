"""`merge`: several checkpoints into one, with the keys of a page of `weightsmith merge`.

    ties: {merge: {method: ties, base: base, models: [code, names], search: {lambda: [0.5, 1.0]}}}

`search` tries every combination of the listed values, scores each on the CALIBRATION pools of `search_tasks`,
and keeps the best; the test pools are never looked at. Each trial is durable, so a killed search goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import PageError, nearest
from weightsmith.evaluation.costs import TORCH_BYTES, predict_scoring
from weightsmith.merging import diagnose, merge, parse_merge, plan_merge
from weightsmith.merging.config import OWN_KEYS
from weightsmith.merging.options import page_key, schema
from weightsmith.recipes.fingerprint import digest, foreign_source
from weightsmith.recipes.stages import scoring
from weightsmith.recipes.stages.contract import (
    Done,
    Forecast,
    Keys,
    Problem,
    Reference,
    Workspace,
    plain,
)
from weightsmith.recipes.stages.merge_costs import LIGHT_BYTES, predict_merge
from weightsmith.recipes.stages.scoring import PageTasks
from weightsmith.recipes.stages.search import best, run_search
from weightsmith.recipes.standin import write_standin
from weightsmith.recipes.validation import show, validate
from weightsmith.registry import card, cards, load
from weightsmith.runs.atomic import write_json
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress

DIAGNOSTICS, SEARCH = "diagnostics.json", "search.json"


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Keys of the stage that a merge page does not have."""

    search: Mapping[str, tuple[float | int, ...]] = field(default_factory=dict)
    """Values to try of numeric options; every combination is one trial."""
    search_tasks: PageTasks = "all"
    """What trials are scored on; `all` for the test-bed tasks that the models were trained on."""
    search_characters: int = 10_000
    """Calibration characters of each domain that a trial reads, about."""
    search_items: int = 400
    """Calibration questions of each skill."""
    device: str = "auto"
    """Where spectral methods compute and trials are scored: `auto` (CUDA where there is one) or `cpu`."""


_EXTRAS = tuple(Extras.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The stage: the body of a merge page, and what is searched."""

    body: Mapping[str, Any]
    extras: Extras = field(default_factory=Extras)

    kind: ClassVar[str] = "merge"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Merge | None, list[Problem]]:
        """The stage from its keys on the page, or every problem found."""
        extras, problems = validate(Extras, {key: value for key, value in body.items() if key in _EXTRAS})
        page = {key: value for key, value in body.items() if key not in _EXTRAS}
        problems += _unknown_keys(page)
        if extras is None or problems:
            return None, problems
        stage = cls(body=page, extras=extras)
        return (None, found) if (found := stage._page_problems()) else (stage, [])

    @property
    def needs_torch(self) -> bool:
        """Trials are scored, spectral methods factorise."""
        return bool(self.extras.search) or self._is_spectral

    @property
    def needs_transformers(self) -> bool:
        """Trials are scored."""
        return bool(self.extras.search)

    def references(self) -> Sequence[Reference]:
        """The base, then the models; an adapter `model+adapter` counts as both."""
        return [Reference(keys, part) for keys, words in _model_words(self.body) for part in _parts(words)]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with the search, or lacks for a stage to make one model."""
        found = []
        per_task = getattr(load(self.body["method"], "merging"), "per_task", False)
        if per_task and self.body.get("task") is None and "task" not in self.extras.search:
            text = "a stage makes one model: give the number of the model whose task it is for, 1 .. "
            found.append(Problem(("task",), f"{text}{len(self.body['models'])}"))
        for option, values in self.extras.search.items():
            if not values:
                found.append(Problem(("search", option), "expected at least one value, found none"))
            if option in self.body:
                found.append(Problem((option,), "is searched too; give it here or in `search`, not both"))
        if self.extras.search:
            found += scoring.task_problems("search_tasks", self.extras.search_tasks)
        for key in ("search_characters", "search_items"):
            if getattr(self.extras, key) < 1:
                found.append(Problem((key,), f"expected at least 1, got {getattr(self.extras, key)}"))
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Merge:
        """`search_tasks: all` by name."""
        names = [reference.value for reference in self.references()]
        trained = scoring.trained_on(names, earlier)
        if not self.extras.search or self.extras.search_tasks != "all" or not trained:
            return self
        return replace(self, extras=replace(self.extras, search_tasks=trained))

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`; what trials are scored on counts only where there are trials."""
        extras = plain(self.extras) if self.extras.search else {"device": self.extras.device}
        return {**plain(self.body), **extras}

    def data_fingerprint(self) -> str:
        """Of what trials are scored on, and of a method from another package."""
        parts = []
        if self.extras.search:
            parts.append(scoring.tasks_fingerprint(self.extras.search_tasks))
        for entry in self.body["models"]:
            if isinstance(entry, Mapping) and "statistics" in entry:
                with Checkpoint.open(str(entry["statistics"])) as measured:
                    parts.append(measured.fingerprint())
        target = card(self.body["method"], "merging").target
        if not target.startswith("weightsmith."):
            parts.append(foreign_source(target.partition(":")[0]))
        return digest(parts) if parts else ""

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """See `contract.Stage`. Options of one length in print make the size exact whichever wins."""
        grid = self._grid()
        longest = max(grid, key=lambda options: len(json.dumps(options)), default={})
        with plan_merge(self._located(models, longest, workspace), device=self._merge_device) as plan:
            standin = write_standin(
                workspace.checkpoint, plan.specs, side_files=plan.side_files, lineage=plan.lineage
            )
            cost, warnings = predict_merge(plan, diagnosed=True), plan.warnings
        if not grid:
            return Forecast(prediction=cost, model=standin, warnings=warnings)
        tasks = self.extras.search_tasks
        trial = predict_scoring(standin, tasks, self.extras.search_characters, self.extras.search_items)
        merging = cost.memory_bytes if self._is_spectral else TORCH_BYTES + cost.memory_bytes - LIGHT_BYTES
        cost = Prediction(
            memory_bytes=max(trial.memory_bytes, merging),
            disk_bytes=cost.disk_bytes,
            seconds=len(grid) * (cost.seconds + trial.seconds) + cost.seconds,
        )
        return Forecast(prediction=cost, model=standin, reads=scoring.names(tasks), warnings=warnings)

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Search where that is asked for, merge, and measure what was merged."""
        outputs = {"checkpoint": "checkpoint", "diagnostics": DIAGNOSTICS}
        chosen: Mapping[str, Any] = {}
        if self.extras.search:
            trials = run_search(
                self._grid(),
                lambda options: self._located(models, options, workspace),
                self.extras,
                workspace.work,
                progress,
            )
            write_json(workspace.folder / SEARCH, [plain(trial) for trial in trials])
            outputs["search"] = SEARCH
            chosen = best(trials).options
        body = self._located(models, chosen, workspace)
        made = merge(body, workspace.checkpoint, device=self._merge_device, progress=progress, overwrite=True)
        measured = diagnose(body, tensors=made.tensors, progress=progress)
        write_json(workspace.folder / DIAGNOSTICS, {**measured, "warnings": list(made.warnings)})
        return Done(outputs, {**self.identity(), **chosen})

    @property
    def _merge_device(self) -> str:
        """Trials may be scored on a GPU although the method computes on the CPU."""
        return self.extras.device if self._is_spectral else "auto"

    @property
    def _is_spectral(self) -> bool:
        return bool(getattr(load(self.body["method"], "merging"), "spectral", False))

    def _grid(self) -> list[dict[str, Any]]:
        """Every combination of the searched options, the first option varying slowest."""
        search = self.extras.search
        if not search:
            return []
        return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]

    def _located(
        self, models: Mapping[str, Path], options: Mapping[str, Any], workspace: Workspace
    ) -> dict[str, Any]:
        """The page with folders for models and values for searched options."""
        return {"seed": workspace.seed, **_with_folders(self.body, models), **options}

    def _page_problems(self) -> list[Problem]:
        """What the merging room says of the page, with each value of the search in its place."""
        if problem := _problem_of(self.body):
            return [problem]
        for option, values in self.extras.search.items():
            for index, value in enumerate(values):
                if problem := _problem_of({**self.body, option: value}):
                    unknown = problem.text.startswith("no such key")
                    keys: Keys = ("search", option) if unknown else ("search", option, index)
                    return [Problem(keys, problem.text)]
        return []


class _Place:
    """Stands for a page where the merging room asks for one: notes which key was wrong."""

    path = ""

    def __init__(self) -> None:
        self.keys: Keys = ()

    def line(self, keys: Keys) -> None:
        self.keys = keys


def _problem_of(body: Mapping[str, Any]) -> Problem | None:
    place = _Place()
    try:
        parse_merge(body, page=place)  # pyrefly: ignore[bad-argument-type]
    except PageError as wrong:
        text = str(wrong).removeprefix(": ").removeprefix(f"{show(place.keys)}: ")
        return Problem(place.keys, text)
    return None


def _unknown_keys(body: Mapping[str, Any]) -> list[Problem]:
    """Keys that neither the stage nor the method has, with the nearest of all that could be meant."""
    if "merge_method" in body:
        text = "is mergekit's; a recipe takes `method`, `base`, `models` (`weightsmith merge` takes both)"
        return [Problem(("merge_method",), text)]
    if body.get("method") not in [entry.id for entry in cards("merging")]:
        return []  # the first problem to tell is the method
    known = [*OWN_KEYS, *schema(load(body["method"], "merging"))]
    return [
        Problem((key,), f"no such key{nearest(key, [*known, *_EXTRAS])}")
        for key in body
        if page_key(key) not in known
    ]


def _model_words(body: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Each place of the page that names a model, and what it says."""
    if body.get("base") is not None:
        yield ("base",), str(body["base"])
    for index, entry in enumerate(body["models"]):
        if isinstance(entry, Mapping):
            yield ("models", index, "model"), str(entry["model"])
        else:
            yield ("models", index), str(entry)
    yield from _tokenizer_words(body.get("tokenizer"), ("tokenizer",))


def _tokenizer_words(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Each place of a tokenizer rule that names a model."""
    if isinstance(value, str) and value not in ("base", "union"):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("source", "model"):
                yield from _tokenizer_words(inner, (*keys, key))
            elif key == "tokens" and isinstance(inner, Mapping):
                for token, rule in inner.items():
                    yield from _tokenizer_words(rule, (*keys, key, token))


def _parts(words: str) -> list[str]:
    """The model, and the adapter on top of it where there is one (`model+adapter`)."""
    model, plus, adapter = words.rpartition("+")
    return [model, adapter] if plus and not Path(words).exists() else [words]


def _with_folders(body: Mapping[str, Any], models: Mapping[str, Path]) -> dict[str, Any]:
    def folder(words: str) -> str:
        return "+".join(str(models[part]) for part in _parts(words))

    def located(value: Any) -> Any:
        if isinstance(value, str):
            return value if value in ("base", "union") else folder(value)
        if not isinstance(value, Mapping):
            return value
        return {
            key: {token: located(rule) for token, rule in inner.items()}
            if key == "tokens" and inner
            else located(inner)
            if key in ("source", "model")
            else inner
            for key, inner in value.items()
        }

    found = dict(body)
    if body.get("tokenizer") is not None:
        found["tokenizer"] = located(body["tokenizer"])
    if body.get("base") is not None:
        found["base"] = folder(str(body["base"]))
    found["models"] = [
        {**entry, "model": folder(str(entry["model"]))} if isinstance(entry, Mapping) else folder(str(entry))
        for entry in body["models"]
    ]
    return found
