"""What a model is scored on: a task of the test-bed, facts to find in a long context, a local file, a task of
lm-evaluation-harness, or a user's function.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightsmith.errors import InputError, nearest
from weightsmith.evaluation import files, harness
from weightsmith.testbed import tasks as bed

Kind = Literal["auto", "bits", "exact", "choice", "niah", "mdqa"]
RETRIEVAL = ("niah", "mdqa")
"""Kinds that are tasks too: then what they need is made on the spot."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One thing to score a model on."""

    task: str
    """A task or task set of the test-bed, `niah` or `mdqa` (see `kind`), a local file (.txt, .md, .jsonl,
    .ndjson, .parquet), `lm_eval:TASK` of lm-evaluation-harness (`lm_eval:FOLDER/TASK` for pages of your own,
    `@METRIC` behind it for another metric than the default), or `module:function`, called with the model and
    its tokenizer and returning a number (higher is better) or a `Score`."""
    name: str | None = None
    """The name in tables; by default the file's or function's."""
    kind: Kind = "auto"
    """How a file is scored: `bits` per byte of its text, `exact` match of answers, multiple `choice`, `niah`
    (codes hidden in the text are asked for), `mdqa` (questions about one of several documents); `auto` is
    bits, or exact where `prompt` is given, or choice where `choices` is. The tasks `niah` and `mdqa` do the
    last two with the test-bed's `docs` and with documents made on the spot."""
    column: str = "text"
    """The column of the text, of the answer (exact), of the right choice's number from 0 (choice), or of the
    answer or list of answers (mdqa)."""
    prompt: str | None = None
    """The column of the question."""
    choices: str | None = None
    """The column of the list of choices, or of documents, the one with the answer first (mdqa)."""
    limit: int | None = None
    """Rows of a file that are read, or questions of each subtask of an `lm_eval:` task; all by default."""
    num_fewshot: int | None = None
    """Examples before each question of an `lm_eval:` task; by default what its page says."""

    @property
    def label(self) -> str:
        """The name in tables."""
        if self.name:
            return self.name
        if self.is_harness:
            return harness.Name.of(self.task).task
        return self.task.partition(":")[2] if self.is_function else Path(self.task).stem

    @property
    def is_bed(self) -> bool:
        """Whether this is a task or task set of the test-bed."""
        return self.task in bed.NAMES

    @property
    def is_retrieval(self) -> bool:
        """Whether this is `niah` or `mdqa` with what is made on the spot."""
        return self.task in RETRIEVAL

    @property
    def needs_nothing(self) -> bool:
        """Whether all that it reads is made by this package."""
        return self.is_bed or self.is_retrieval

    @property
    def is_harness(self) -> bool:
        """Whether this is a task of lm-evaluation-harness."""
        return self.task.startswith(harness.PREFIX)

    @property
    def is_function(self) -> bool:
        """Whether this is a user's `module:function`."""
        return not self.is_bed and not self.is_harness and _FUNCTION.fullmatch(self.task) is not None

    @property
    def scored_as(self) -> Kind:
        """The kind of a file, `auto` resolved."""
        if self.kind != "auto":
            return self.kind
        if self.is_retrieval:
            return "niah" if self.task == "niah" else "mdqa"
        return "choice" if self.choices else "exact" if self.prompt else "bits"

    def check(self) -> None:
        """Raise `InputError` for what can be known before a model is loaded: names, files, columns asked
        for.
        """
        if self.limit is not None and self.limit < 1:
            raise InputError(f"task `{self.label}`: limit must be at least 1, got {self.limit}")
        if self.is_harness:
            if self.kind != "auto" or self.prompt or self.choices:
                raise InputError(
                    f"task `{self.label}`: kind, prompt and choices are of files; a task of the harness has "
                    "a page that says them"
                )
            harness.check(self.task, self.num_fewshot)
            return
        if self.num_fewshot is not None:
            raise InputError(f"task `{self.label}`: num_fewshot is of tasks of lm-evaluation-harness")
        if self.is_bed:
            return
        if self.is_retrieval:
            if self.kind not in ("auto", self.task):
                raise InputError(f"task `{self.label}`: kind {self.kind} needs a file, found `{self.task}`")
            return
        if self.is_function:
            load_function(self.task)
            return
        if Path(self.task).suffix not in files.KINDS and not Path(self.task).is_file():
            known = (*bed.NAMES, *RETRIEVAL)
            raise InputError(
                f"no task `{self.task}`{nearest(self.task, known)}; expected one of the test-bed "
                f"({', '.join(bed.NAMES)}), niah, mdqa, a file ({' '.join(files.KINDS)}), lm_eval:TASK or "
                "module:function"
            )
        files.open_file(self.task).close()
        if self.scored_as in ("exact", "choice", "mdqa") and self.prompt is None:
            raise InputError(
                f"task `{self.label}`: kind {self.scored_as} needs `prompt`, the column of the question"
            )
        if self.scored_as in ("choice", "mdqa") and self.choices is None:
            wanted = "choices" if self.scored_as == "choice" else "documents, the one with the answer first"
            raise InputError(
                f"task `{self.label}`: kind {self.scored_as} needs `choices`, the column of the {wanted}"
            )


Tasks = str | TaskConfig | Sequence[str | TaskConfig]


def check_tasks(tasks: Tasks) -> tuple[TaskConfig, ...]:
    """The tasks one by one, sets of the test-bed taken apart, each checked without loading a model.

    Raises:
        InputError: an unknown name (with the nearest), a missing file, a name twice, or nothing to do.
    """
    listed = (tasks,) if isinstance(tasks, (str, TaskConfig)) else tuple(tasks)
    found: dict[str, TaskConfig] = {}
    for entry in listed:
        config = TaskConfig(task=entry) if isinstance(entry, str) else entry
        config.check()
        parts = [TaskConfig(task=part) for part in bed.expand(config.task)] if config.is_bed else [config]
        if len(parts) == 1 and config.is_bed:
            parts = [TaskConfig(task=parts[0].task, name=config.name)]
        for part in parts:
            if part.label in found and found[part.label] != part:
                raise InputError(f"two tasks are called `{part.label}`: give one of them another `name`")
            found[part.label] = part
    if not found:
        raise InputError("tasks: nothing to score a model on")
    return tuple(found.values())


def task_names(tasks: Tasks) -> tuple[str, ...]:
    """The names of the scores that `evaluate` will give, in order. Raises as `check_tasks`."""
    return tuple(config.label for config in check_tasks(tasks))


def load_function(name: str) -> Callable[[Any, Any], Any]:
    """Import the function of `module:function`.

    Raises:
        InputError: no such module or function, or it can't be called.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as problem:
        raise InputError(f"task `{name}` can't be imported: {problem}") from problem
    if not callable(found):
        raise InputError(
            f"task `{name}` is {type(found).__name__}, expected a function of (model, tokenizer)"
        )
    return found
