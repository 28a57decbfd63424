"""Calibration tasks made of what `evaluate` takes: the test-bed's, files, `lm_eval:` tasks, functions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from weightsmith.compression.tailoring.harness import HarnessTask
from weightsmith.compression.tailoring.scoring import Example, FunctionTask, Kind, Task, TokenTask
from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig, check_tasks, files, likelihood
from weightsmith.evaluation.models import window_length
from weightsmith.evaluation.score import Score
from weightsmith.evaluation.tasks import load_function
from weightsmith.testbed import TASKS, VOCABULARY, items, passages


@dataclass(frozen=True)
class _Whole:
    """`module:function` of a model and its tokenizer, as `evaluate` takes it: one example."""

    path: str
    tokenizer: Any

    @property
    def __wrapped__(self) -> Any:
        """The function itself, to `inspect`."""
        return load_function(self.path)

    def __call__(self, model: Any, indices: Sequence[int]) -> list[float]:
        given = load_function(self.path)(model, self.tokenizer)
        if isinstance(given, Score):
            if not given.higher_is_better:
                raise InputError(
                    f"task `{self.path}`: lower is better; wrap your metric: cost must be 1 - score"
                )
            given = given.value
        return [float(given) for _ in indices]


def calibration_tasks(
    tasks: str | TaskConfig | Task | Sequence[str | TaskConfig | Task],
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    examples: int = 1000,
    length: int | None = None,
    text: Literal["perplexity", "retained"] = "perplexity",
) -> list[Task]:
    """Tasks to search on: those of the test-bed read its calibration half, those of lm-evaluation-harness a
    split that it does not score, files are read from their beginning.

    Args:
        tasks: What `weightsmith.evaluation.evaluate` takes, or tasks of your own.
        tokenizer: Of the base; None where no task needs one.
        config: The base's config as a dictionary.
        examples: Of each task, at most.
        length: Tokens of an example of text; a quarter of the model's positions, at most 1,024, by default.
        text: How text is scored.

    Raises:
        InputError: an unknown task, one that has no score per example, or a name twice.
    """
    several = isinstance(tasks, Sequence) and not isinstance(tasks, str)
    given: Any = tasks if several else [tasks]
    found: list[Task] = []
    for entry in given:
        if not isinstance(entry, str | TaskConfig):
            if not hasattr(entry, "score"):
                raise InputError(
                    f"tasks: found {entry!r}, expected names or tasks; a function needs its number of "
                    "examples: FunctionTask(name, function, size)"
                )
            found.append(entry)
            continue
        for one in check_tasks(entry):
            if one.is_harness:
                found.append(HarnessTask(one, _needed(tokenizer, one.label), examples))
                continue
            words = _Words(tokenizer, one.label) if not one.is_function else None
            found.append(_task(one, words, tokenizer, examples, length or window_length(config), text))
    names = [task.name for task in found]
    for task in found:
        if names.count(task.name) > 1:
            raise InputError(f"two tasks are called `{task.name}`: give one of them another `name`")
        if task.size < 1:
            raise InputError(f"task `{task.name}`: has no examples")
    if not found:
        raise InputError("tasks: nothing to score a configuration on")
    return found


def _needed(tokenizer: Any, task: str) -> Any:
    if tokenizer is None:
        raise InputError(f"task `{task}` needs the base's tokenizer: give `tokenizer`")
    return tokenizer


class _Words:
    """Texts as token ids."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        self._tokenizer = _needed(tokenizer, task)
        self.start = likelihood.start_token(tokenizer)
        self.end = tokenizer.eos_token_id
        self.is_bed = tokenizer.get_vocab() == VOCABULARY

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def pair(self, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt and what follows it, tokenised together: a token may span the two."""
        before, both = self.ids(prompt), self.ids(prompt + answer)
        cut = min(len(before), len(both) - 1)
        if cut < 0 or not answer:
            raise InputError(f"an answer to {prompt!r:.40} is empty")
        return (self.start, *both[:cut]), tuple(both[cut:])

    def windows(self, texts: Iterable[str], length: int) -> list[Example]:
        """Pieces of `length` tokens; a shorter rest only of a text that has no other."""
        found = []
        for text in texts:
            ids = self.ids(text)
            pieces = [tuple(ids[begin : begin + length]) for begin in range(0, len(ids), length)]
            found += [
                Example((self.start,), (piece,))
                for piece in pieces
                if len(piece) == length or len(pieces) == 1
            ]
        return found


def _task(
    config: TaskConfig, words: _Words | None, tokenizer: Any, examples: int, length: int, text: Kind
) -> Task:
    name = config.label
    if words is None:
        return FunctionTask(name, _Whole(config.task, tokenizer), 1)
    if config.is_bed:
        kind = TASKS[config.task]
        if kind == "domain":
            # Pieces of a passage that are cut off are why more is read than is used.
            texts = passages(config.task, "calibration", int(1.2 * examples * length) + 1000)
            return TokenTask(name, text, tuple(islice(_spread(words.windows(texts, length)), examples)))
        if kind == "alignment" and config.task != "help":
            raise InputError(
                f"task `{name}`: has no score per example in 0..1 (it weighs two kinds of questions)"
            )
        if words.end is None:
            raise InputError("the tokenizer has no end token (eos_token): an answer has no end")
        found = []
        for item in items(config.task, "calibration", examples):
            found.append(
                Example((words.start, *words.ids(item.question)), ((*words.ids(item.answer), words.end),))
            )
        return TokenTask(name, "exact", tuple(found))
    rows = min(examples, config.limit or examples)
    if config.scored_as == "bits":
        found = words.windows(islice(files.read_texts(config.task, config.column), config.limit), length)
        return TokenTask(name, text, tuple(islice(_spread(found), examples)))
    if config.scored_as == "exact":
        columns = (config.prompt or "", config.column)
        pairs = islice(files.read_rows(config.task, columns), rows)
        return TokenTask(name, "exact", tuple(_exact(words, *map(str, pair)) for pair in pairs))
    if config.scored_as == "choice":
        columns = (config.prompt or "", config.choices or "", config.column)
        questions = enumerate(islice(files.read_rows(config.task, columns), rows), start=1)
        return TokenTask(name, "choice", tuple(_choice(words, config.task, *pair) for pair in questions))
    raise InputError(f"task `{name}`: kind {config.scored_as} has no score per example yet")


def _exact(words: _Words, prompt: str, answer: str) -> Example:
    before, after = words.pair(prompt, answer)
    return Example(before, (after,))


def _choice(words: _Words, file: str, number: int, row: tuple[Any, ...]) -> Example:
    prompt, choices, right = row
    if not isinstance(choices, list) or len(choices) < 2 or right not in range(len(choices)):
        raise InputError(
            f"{file}: question {number}: expected two or more choices and the number of the right one from "
            f"0, found {choices!r:.60} and {right!r}"
        )
    pairs = [words.pair(str(prompt), str(choice)) for choice in choices]
    # A token that spans the two belongs to the answer, so prompts may differ: the shortest is common to all.
    shortest = min((before for before, _ in pairs), key=len)
    answers = tuple((*before[len(shortest) :], *after) for before, after in pairs)
    return Example(shortest, answers, tuple(len(str(choice)) for choice in choices), right)


def _spread(examples: Sequence[Example]) -> list[Example]:
    """The same in an order whose beginning is spread over the whole."""
    return random.Random(0).sample(examples, len(examples))
