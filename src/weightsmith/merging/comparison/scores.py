"""What the models of a comparison are scored on, and what "better" is over several tasks.

Gain     of a model over a reference, the mean over tasks of: the difference, where the metric is a share of
         items (exact match, accuracy); else the relative change, counted so that improvement is positive.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig, evaluate, harness
from weightsmith.evaluation.score import RANGES
from weightsmith.evaluation.tasks import load_function
from weightsmith.runs.progress import Progress
from weightsmith.testbed import fingerprint
from weightsmith.testbed.domains import Split

Scores = Mapping[str, Mapping[str, Any]]
"""Task -> what `Score.to_json` gives."""


def scored(
    model: str | Path, tasks: Sequence[TaskConfig], split: Split, device: str, progress: Progress
) -> Scores:
    """A model's scores. Raises as `evaluate`."""
    found = evaluate(model, tasks, split, device=device, progress=progress)
    return {task: score.to_json() for task, score in found.items()}


def gain(scores: Scores, reference: Scores) -> float:
    """By how much a model is better than the reference; see the top."""
    found = []
    for task, score in scores.items():
        change = score["value"] - reference[task]["value"]
        change = change if score["higher_is_better"] else -change
        if RANGES.get(score["metric"], (0.0, math.inf))[1] != 1.0:
            size = abs(reference[task]["value"])
            change = change / size if size else math.copysign(math.inf, change) if change else 0.0
        found.append(change)
    return sum(found) / len(found)


def tasks_digest(tasks: Sequence[TaskConfig], split: Split) -> str:
    """Stands for what scoring reads: tasks, split, the content of files, the source of functions."""
    parts: list[Any] = [split]
    for task in tasks:
        if task.needs_nothing:
            content = fingerprint()
        elif task.is_function:
            file = inspect.getsourcefile(inspect.unwrap(load_function(task.task)))
            content = _of_file(file) if file else ""
        elif task.is_harness:
            files = [(str(file), _of_file(str(file))) for file in harness.local_files(task.task)]
            content = digest([harness.version(), files])
        else:
            content = _of_file(task.task)
        parts.append([asdict(task), content])
    return digest(parts)


def digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def score_inputs(
    inputs: Sequence[tuple[str, str]],
    tasks: Sequence[TaskConfig],
    split: Split,
    device: str,
    progress: Progress,
) -> tuple[dict[str, Scores], list[str]]:
    """Scores of base and models by name, and why some have none (an adapter alone is no model).

    Args:
        inputs: Name and folder or hub id of each.
        tasks: What on.
        split: Which pool of the test-bed's tasks.
        device: Where.
        progress: Told about each task.
    """
    found: dict[str, Scores] = {}
    notes = []
    for name, source in inputs:
        try:
            found[name] = scored(source, tasks, split, device, progress)
        except InputError as problem:
            notes.append(f"{name} is not scored by itself: {problem}")
    return found, notes
