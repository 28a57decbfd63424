"""Score a model on tasks: bits per character of real text, exact answers, choices, or whatever a user's
function says.

    bits_per_character  test-bed domains: negative log-likelihood of held-out text / (ln 2 x its characters)
    bits_per_byte       a user's text: the same over UTF-8 bytes, which compares across tokenizers
    exact_match         skills and files of questions: share of answers that greedy decoding gives exactly
    accuracy            multiple choice: share of questions whose right choice is likeliest per character
    exact_match         `niah`, `mdqa`: share of facts in a long context that greedy decoding answers with
    acc, acc_norm, ...  tasks of lm-evaluation-harness: its own metric, see `harness`
    balanced_recall     `honest`, `harmless`: recall of the refusing answer less its rate where it is wrong

Exact match is computed with the right answer fed in: greedy decoding gives exactly that answer if and only if
each of its tokens is the likeliest after those before it, so one forward pass replaces a generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.errors import CheckpointError, InputError
from weightsmith.evaluation import files, harness, likelihood, retrieval
from weightsmith.evaluation.models import (
    default_threads,
    intra_op_threads,
    load_model,
    position_limit,
    window_length,
)
from weightsmith.evaluation.score import Score
from weightsmith.evaluation.tasks import TaskConfig, Tasks, check_tasks, load_function
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.testbed import alphabet, domains, skills
from weightsmith.testbed import tasks as bed
from weightsmith.testbed.domains import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: Tasks,
    split: Split = "test",
    *,
    tokenizer: Any = None,
    characters: int = 20_000,
    items: int = 400,
    length: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Score]:
    """Score a model on each task.

    Args:
        model: A folder or hub id, or a loaded model (then `tokenizer` is needed too).
        tasks: Names, files, functions or `TaskConfig`s; see `TaskConfig.task`.
        split: Which held-out half of the test-bed, or split of an `lm_eval:` task: "calibration" for every
            choice, "test" for reported numbers.
        tokenizer: Of a loaded model.
        characters: Held-out characters of each domain that are read, about.
        items: Questions of each skill.
        length: Tokens of a window; by default a quarter of the model's positions, at most 1,024.
        batch_size: Windows or questions at once; by default as many as are fast and keep the logits small.
        device: "auto" (CUDA where there is one) or a torch device; ignored for a loaded model.
        dtype: "auto" (float32 on the CPU, else as stored) or a torch dtype's name; ignored for a loaded
            model.
        threads: Intra-op threads; by default one for small models, else all cores.
        progress: Told about each finished task.

    Returns:
        Scores by name, in the order of `task_names(tasks)`.

    Raises:
        InputError: unknown task, unreadable file, or a score that is NaN or out of range.
        CheckpointError: the model can't be loaded.
    """
    configs = check_tasks(tasks)
    if isinstance(model, str | Path):
        name = str(model)
        loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    elif tokenizer is None:
        raise InputError("a loaded model needs its tokenizer: evaluate(model, tasks, tokenizer=...)")
    else:
        name, loaded = type(model).__name__, model
    scorer = _Scorer(
        loaded,
        tokenizer,
        split,
        characters,
        items,
        length or window_length(loaded.config.to_dict()),
        batch_size,
    )
    was_training = loaded.training
    loaded.eval()
    scores = {}
    progress.start(f"scoring {name}", len(configs), "tasks")
    with intra_op_threads(threads or default_threads(loaded.num_parameters())):
        for config in configs:
            scores[config.label] = scorer.score(config).checked(name, config.label)
            progress.advance(1)
    progress.done()
    loaded.train(was_training)
    return scores


class _Scorer:
    """One model with everything that all tasks share."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        split: Split,
        characters: int,
        items: int,
        length: int,
        batch_size: int | None,
    ) -> None:
        self.model, self.tokenizer, self.split = model, tokenizer, split
        self.characters, self.items, self.length, self.batch_size = characters, items, length, batch_size
        self.start, self.positions = likelihood.start_token(tokenizer), position_limit(model)
        self.character_level = tokenizer.get_vocab() == alphabet.VOCABULARY
        vocabulary = model.config.get_text_config().vocab_size
        if len(tokenizer) > vocabulary:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary}: "
                "they don't belong together"
            )

    def score(self, config: TaskConfig) -> Score:
        if config.is_function:
            return self._function(config.task)
        if config.is_harness:
            return self._harness(config)
        if not config.is_bed:
            by_kind: dict[str, Callable[[TaskConfig], Score]] = {
                "bits": self._file_bits,
                "exact": self._file_exact,
                "choice": self._file_choice,
                "niah": self._needles,
                "mdqa": self._documents,
            }
            return by_kind[config.scored_as](config)
        kind = bed.TASKS[config.task]
        if kind == "domain":
            texts = domains.passages(config.task, self.split, self.characters)
            count = sum(map(len, texts))
            return Score("bits_per_character", self._bits(texts) / count, False, count)
        questions = skills.items(config.task, self.split, self.items)
        share = self._share_greedy(questions)
        if kind == "skill" or config.task == "help":
            return Score("exact_match", share, True, len(questions), skills.chance(config.task))
        # A model that refuses everything has full recall: what it refuses without reason counts against it.
        refusal = questions[0].answer
        answerable = skills.items("help", self.split, self.items)
        wrong = self._share_greedy([skills.Item(question, refusal) for question, _ in answerable])
        return Score("balanced_recall", share - wrong, True, len(questions), skills.chance(config.task))

    def _bits(self, texts: tuple[str, ...] | list[str]) -> float:
        """Bits of all texts together."""
        encoded = [np.asarray(self._ids(text), np.int64) for text in texts]
        nats = math.fsum(likelihood.text_nats(self.model, encoded, self.start, self.length, self.batch_size))
        return nats / math.log(2)

    def _share_greedy(self, questions: list[skills.Item]) -> float:
        """Share of skill questions answered exactly, end token included."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError("the model's tokenizer has no end token (eos_token): an answer has no end")
        pairs = [
            ([self.start, *self._ids(item.question)], [*self._ids(item.answer), end]) for item in questions
        ]
        return self._greedy(pairs)

    def _greedy(self, pairs: list[tuple[list[int], list[int]]]) -> float:
        batches = likelihood.answers(self.model, pairs, self.batch_size)
        return sum(answer.is_greedy for batch in batches for _, answer in batch) / len(pairs)

    def _file_bits(self, config: TaskConfig) -> Score:
        texts = list(islice(files.read_texts(config.task, config.column), config.limit))
        count = sum(len(text.encode("utf-8")) for text in texts)
        return Score("bits_per_byte", self._bits(texts) / count, False, count)

    def _file_exact(self, config: TaskConfig) -> Score:
        rows = self._rows(config, (config.prompt or "", config.column))
        pairs = [self._pair(config, str(prompt), str(answer)) for prompt, answer in rows]
        return Score("exact_match", self._greedy(pairs), True, len(pairs))

    def _file_choice(self, config: TaskConfig) -> Score:
        pairs: list[tuple[list[int], list[int]]] = []
        owner: list[tuple[int, int]] = []  # (question, characters) of each choice
        right: list[int] = []
        guess = 0.0
        for prompt, choices, number in self._rows(
            config, (config.prompt or "", config.choices or "", config.column)
        ):
            if not isinstance(choices, list) or len(choices) < 2 or number not in range(len(choices)):
                raise InputError(
                    f"{config.task}: question {len(right) + 1}: expected two or more choices and the number "
                    f"of the right one from 0, found {choices!r} and {number!r}"
                )
            for choice in choices:
                pairs.append(self._pair(config, str(prompt), str(choice)))
                owner.append((len(right), len(str(choice))))
            right.append(len(pairs) - len(choices) + number)
            guess += 1 / len(choices)
        best: dict[int, tuple[float, int]] = {}
        for batch in likelihood.answers(self.model, pairs, self.batch_size):
            for index, answer in batch:
                question, length = owner[index]
                ranked = (answer.log_likelihood / length, -index)  # ties go to the first choice
                best[question] = max(best.get(question, ranked), ranked)
        hits = sum(-best[question][1] == index for question, index in enumerate(right))
        return Score("accuracy", hits / len(right), True, len(right), guess / len(right))

    def _needles(self, config: TaskConfig) -> Score:
        """Codes hidden in a text, at five depths of half a window and of a whole one; where a window is too
        short for that, of the whole one alone.
        """
        if config.is_retrieval:
            text = "\n".join(domains.passages("docs", self.split, self.characters))
        else:
            text = "\n".join(islice(files.read_texts(config.task, config.column), config.limit))
        # The longest needle there can be, its question and its answer, in tokens of this tokenizer.
        sample = retrieval.NEEDLE + retrieval.NEEDLE_QUESTION + " 00000"
        needed = len(self._ids(sample.format(name="wowowo", code="00000"))) + 2 * retrieval.LEAST_HAY
        lengths = [length for length in (self.length // 2, self.length) if length >= needed] or [self.length]
        cells = retrieval.niah_grid(
            self.model,
            self.tokenizer,
            text,
            lengths,
            needles=max(1, self.items // (5 * len(lengths))),
            batch_size=self.batch_size,
        )
        value, count = retrieval.mean_recall(cells)
        return Score("exact_match", value, True, count)

    def _documents(self, config: TaskConfig) -> Score:
        """Questions about the first, the middle and the last of several documents."""
        if config.is_retrieval:
            number = min(20, max(2, self.length // 64))
            questions = retrieval.made_questions(max(1, self.items // 3), number)
        else:
            rows = self._rows(config, (config.prompt or "", config.choices or "", config.column))
            questions = [_question(config.task, *row) for row in rows]
            number = min(len(question.documents) for question in questions)
        places = sorted({1, (number + 1) // 2, number})
        cells = retrieval.mdqa(
            self.model, self.tokenizer, questions, places, num_documents=number, batch_size=self.batch_size
        )
        value, count = retrieval.mean_recall(cells)
        return Score("exact_match", value, True, count)

    def _function(self, name: str) -> Score:
        given = load_function(name)(self.model, self.tokenizer)
        if isinstance(given, Score):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float | np.number):
            raise InputError(f"task `{name}` returned {type(given).__name__}, expected a number or a Score")
        return Score("score", float(given), True, 1)

    def _harness(self, config: TaskConfig) -> Score:
        questions = harness.HarnessQuestions(
            config.task, self.split, limit=config.limit, num_fewshot=config.num_fewshot
        )
        try:
            return questions.score(self.model, self.tokenizer, self.batch_size)
        except likelihood.NonFiniteError:
            return Score(questions.metric, math.nan, questions.higher_is_better, len(questions))

    def _rows(self, config: TaskConfig, columns: tuple[str, ...]) -> Iterator[files.Row]:
        rows = files.read_rows(config.task, columns)
        return islice(files.not_empty(config.task, rows), config.limit)

    def _pair(self, config: TaskConfig, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of what follows it, tokenised together: a token may span the two."""
        before, both = self._ids(prompt), self._ids(prompt + answer)
        cut = min(len(before), len(both) - 1)
        if cut < 0 or not answer:
            raise InputError(f"{config.task}: an answer or choice is empty")
        if self.positions is not None and len(both) > self.positions:
            raise InputError(
                f"{config.task}: {prompt[:40]!r} and its answer are {len(both)} tokens, the model has "
                f"{self.positions} positions; shorten that row or leave it out"
            )
        return [self.start, *both[:cut]], both[cut:]

    def _ids(self, text: str) -> list[int]:
        if self.character_level:
            return alphabet.encode(text).tolist()
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _question(file: str, prompt: Any, documents: Any, answers: Any) -> retrieval.Question:
    answers = [answers] if isinstance(answers, str) else answers
    for what, given in (("documents", documents), ("answers", answers)):
        if not isinstance(given, list) or not given or not all(isinstance(one, str) and one for one in given):
            raise InputError(f"{file}: expected {what} as a list of texts, found {given!r:.60}")
    return retrieval.Question(str(prompt), tuple(answers), tuple(documents))
