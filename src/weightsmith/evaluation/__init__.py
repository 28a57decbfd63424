"""Scorers for any Hugging Face causal language model. Names load on first use: importing the room costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.evaluation.models import load_model
    from weightsmith.evaluation.prompting import prompts
    from weightsmith.evaluation.retrieval import Cell, Question, made_questions, mdqa, niah_grid
    from weightsmith.evaluation.score import Score
    from weightsmith.evaluation.scoring import evaluate
    from weightsmith.evaluation.tasks import TaskConfig, check_tasks, task_names

_HOMES = {
    "Cell": "retrieval",
    "Question": "retrieval",
    "Score": "score",
    "TaskConfig": "tasks",
    "check_tasks": "tasks",
    "evaluate": "scoring",
    "load_model": "models",
    "made_questions": "retrieval",
    "mdqa": "retrieval",
    "niah_grid": "retrieval",
    "prompts": "prompting",
    "task_names": "tasks",
}

__all__ = [
    "Cell",
    "Question",
    "Score",
    "TaskConfig",
    "check_tasks",
    "evaluate",
    "load_model",
    "made_questions",
    "mdqa",
    "niah_grid",
    "prompts",
    "task_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
