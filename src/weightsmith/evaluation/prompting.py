"""Prompts of tasks, as scoring shows them to a model: what a router is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from weightsmith.errors import InputError
from weightsmith.evaluation import files
from weightsmith.evaluation.likelihood import start_token
from weightsmith.evaluation.tasks import TaskConfig, Tasks, check_tasks
from weightsmith.testbed import alphabet, domains, skills
from weightsmith.testbed import tasks as bed
from weightsmith.testbed.domains import Split

Prompt = list[int]
_CHARACTERS = 8  # of a text for each token wanted of it


def prompts(
    tasks: Tasks, tokenizer: Any, count: int, *, split: Split = "calibration", length: int = 96
) -> list[Prompt]:
    """Token ids of `count` prompts, as many of each task as of any other.

    Questions are prompts as they are; texts are cut into pieces of half a window, which is what a model that
    chooses its weights by the prompt sees of them.

    Args:
        tasks: As `evaluate` takes them, functions excepted.
        tokenizer: Of the model.
        count: Prompts in all; fewer where there are fewer.
        split: Which held-out half of the test-bed; "test" is for reported numbers only.
        length: Tokens of a window.

    Raises:
        InputError: an unknown task, an unreadable file, or a function.
    """
    configs = check_tasks(tasks)
    start = start_token(tokenizer)
    share = -(-count // len(configs))
    found = [_of_task(config, tokenizer, share, split, max(1, length // 2) - 1) for config in configs]
    mixed = [prompt for turn in range(share) for listed in found for prompt in listed[turn : turn + 1]]
    return [[start, *ids] for ids in mixed[:count]]


def token_ids(tokenizer: Any, text: str) -> Sequence[int]:
    """A text's tokens without special ones."""
    if tokenizer.get_vocab() == alphabet.VOCABULARY:
        return alphabet.encode(text).tolist()
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _of_task(
    config: TaskConfig, tokenizer: Any, count: int, split: Split, length: int
) -> list[Sequence[int]]:
    if config.is_function or config.is_retrieval or config.is_harness:
        kind = "function" if config.is_function else "task of retrieval"
        kind = "task of lm-evaluation-harness" if config.is_harness else kind
        raise InputError(f"prompts: `{config.task}` is a {kind}; expected a task of the test-bed or a file")
    if config.is_bed:
        if bed.TASKS[config.task] != "domain":
            items = skills.items(config.task, split, count)
            return [token_ids(tokenizer, item.question) for item in items]
        texts: Sequence[str] = domains.passages(config.task, split, count * max(1, length) * _CHARACTERS)
    elif config.scored_as == "bits":
        texts = list(islice(files.read_texts(config.task, config.column), config.limit or count))
    else:
        rows = files.not_empty(config.task, files.read_rows(config.task, (config.prompt or "",)))
        return [token_ids(tokenizer, str(prompt)) for (prompt,) in islice(rows, count)]
    pieces = [
        ids[at : at + max(1, length)]
        for ids in (token_ids(tokenizer, text) for text in texts)
        for at in range(0, max(1, len(ids) - length + 1), max(1, length))
    ]
    step = max(1, len(pieces) // count)
    return pieces[::step][:count]
