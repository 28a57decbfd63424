"""What stages that score models share: tasks as a page writes them, what they stand for, what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig, check_tasks, task_names
from weightsmith.recipes.fingerprint import digest, file_digest, foreign_source
from weightsmith.recipes.stages.contract import Keys, Problem
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.runs.speed import matmul_flops

# A process forked from the one that has imported torch and transformers, a model loaded and run once.
PROCESS_BYTES = 405_000_000
LOAD_SECONDS = 0.3
# Tokens that a window shares with the one before, a test-bed question's length, characters of a token of
# text.
_OVERLAP, _QUESTION_TOKENS, _TOKEN_CHARACTERS = 2.0, 24, 4
# Small products, attention and the softmax over the vocabulary reach this part of the speed of large
# products.
_EFFICIENCY = 0.35


@dataclass(frozen=True, kw_only=True)
class Task(TaskConfig):
    """A task as a page writes it: unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


PageTasks = str | Task | tuple[str | Task, ...]


def names(tasks: PageTasks) -> tuple[str, ...]:
    """The names of the scores that the tasks give."""
    return task_names(tasks)


def task_problems(key: str, tasks: PageTasks) -> list[Problem]:
    """What is wrong with tasks, each entry of a list at its own line."""
    entries: list[tuple[Keys, Any]] = [((key,), tasks)]
    if isinstance(tasks, tuple):
        entries = [((key, index), entry) for index, entry in enumerate(tasks)] + entries
    for keys, entry in entries:
        try:
            check_tasks(entry)
        except InputError as wrong:
            return [Problem(keys, str(wrong).removeprefix("tasks: "))]
    return []


def trained_on(models: Sequence[str], earlier: Mapping[str, Any]) -> tuple[str, ...]:
    """Test-bed tasks that the stages behind `models` train on, in the bed's order."""
    from weightsmith.testbed import TASKS

    seen: set[str] = set()
    tasks: set[str] = set()
    waiting = list(models)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in earlier:
            continue
        seen.add(name)
        config = earlier[name]
        waiting += [reference.value for reference in config.references()]
        if hasattr(config, "trains_on"):
            tasks.update(config.trains_on())
    return tuple(task for task in TASKS if task in tasks)


def tasks_fingerprint(tasks: PageTasks) -> str:
    """Stands for what scoring on `tasks` reads."""
    from weightsmith.testbed import fingerprint

    parts = {}
    for task in check_tasks(tasks):
        if task.is_bed:
            parts[task.label] = fingerprint()
        elif task.is_function:
            parts[task.label] = foreign_source(task.task.partition(":")[0])
        else:
            parts[task.label] = file_digest(task.task)
    return digest(parts)


def predict_scoring(model: Path, tasks: PageTasks, characters: int, items: int) -> Prediction:
    """Cost of scoring one checkpoint on `tasks`, loading included; arguments as `evaluate`."""
    from weightsmith.testbed import TASKS

    with Checkpoint.open(model) as checkpoint:
        parameters = sum(info.numel for info in checkpoint.tensors.values())
        vocabulary = int((checkpoint.config.get("text_config") or checkpoint.config).get("vocab_size") or 0)
    per_token = 1 if vocabulary <= 256 else _TOKEN_CHARACTERS
    tokens = 0.0
    for task in check_tasks(tasks):
        if not task.is_bed:
            size = Path(task.task).stat().st_size if Path(task.task).is_file() else 0
            tokens += _OVERLAP * size / per_token
        elif TASKS[task.task] == "domain":
            tokens += _OVERLAP * characters / per_token
        else:
            tokens += items * _QUESTION_TOKENS
    seconds = 2.0 * parameters * tokens / (matmul_flops() * _EFFICIENCY)
    return Prediction(PROCESS_BYTES + 4 * parameters, 0, LOAD_SECONDS + seconds)


class Within:
    """Progress of a part of a larger task, which the outer progress counts in the same units."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer

    def start(self, label: str, total: float, unit: str) -> None:
        """The outer task has begun already."""

    def advance(self, amount: float) -> None:
        """Passed on."""
        self._outer.advance(amount)

    def done(self) -> None:
        """The outer task goes on."""
