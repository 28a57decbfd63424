"""What stages that score models share: tasks as a page writes them, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig, check_tasks, harness, task_names
from weightsmith.recipes.fingerprint import digest, file_digest, foreign_source
from weightsmith.recipes.stages.contract import Keys, Problem
from weightsmith.runs.progress import Progress


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
        if task.needs_nothing:
            parts[task.label] = fingerprint()
        elif task.is_function:
            parts[task.label] = foreign_source(task.task.partition(":")[0])
        elif task.is_harness:
            files = {str(file): file_digest(file) for file in harness.local_files(task.task)}
            parts[task.label] = digest({"lm_eval": harness.version(), **files})
        else:
            parts[task.label] = file_digest(task.task)
    return digest(parts)


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
