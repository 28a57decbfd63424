"""Calibration tasks: a score in [0, 1] for each example, so that larger budgets go on where smaller ones
ended.

    exact        1 where greedy decoding gives exactly the answer
    choice       1 where the right choice is likeliest per character
    perplexity   exp(nll_dense - nll): the base's perplexity on the example over the model's, at most 1
    retained     (ln V - nll) / (ln V - nll_dense): the part of the base's gain over uniform guessing that is
                 left
    function     what a function of the model and of the examples' numbers returns

The score of a task at budget b is the mean over the first b examples of one seeded order, in which subtasks
are spread evenly: a rung scores only what the rung below it did not.

Source  arXiv:2506.20480 takes the first b documents of each subtask instead. The mapping of perplexity is the
        reciprocal of the spec's formula, which grows where the model gets worse.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, Protocol

from weightsmith.errors import InputError
from weightsmith.evaluation import likelihood
from weightsmith.evaluation.likelihood import NonFiniteError
from weightsmith.evaluation.models import position_limit
from weightsmith.runs.seeds import derive

Kind = Literal["exact", "choice", "perplexity", "retained"]


class Task(Protocol):
    """What a configuration is scored on. Where it has an attribute `digest`, a string that stands for its
    content, a log knows it by that, too.
    """

    @property
    def name(self) -> str:
        """Its name in tables and logs."""
        ...

    @property
    def size(self) -> int:
        """Examples that there are."""
        ...

    @property
    def strata(self) -> Sequence[Hashable] | None:
        """The subtask of each example; None where there is one."""
        ...

    def prepare(self, base: Any) -> Task:
        """The task that knows what it must of the base."""
        ...

    def score(self, model: Any, indices: Sequence[int]) -> Sequence[float]:
        """A score in [0, 1] for each of the examples.

        Raises:
            NonFiniteError: logits held NaN or infinity.
        """
        ...


class Example(NamedTuple):
    """One example, tokenised.

    Attributes:
        prompt: Token ids, the start token first.
        answers: Token ids of the answer, or of each choice.
        lengths: Characters of each choice.
        right: The number of the right one.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...] = (1,)
    right: int = 0


@dataclass(frozen=True)
class TokenTask:
    """A task of prompts and answers.

    Attributes:
        name: Its name.
        kind: How an example is scored.
        examples: Tokenised.
        strata: As in `Task`.
        batch_size: Rows at once; by default as many as are fast.
        reference: Of each example, nats per token under the base; for the kinds that need it.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    strata: Sequence[Hashable] | None = None
    batch_size: int | None = None
    reference: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Examples that there are."""
        return len(self.examples)

    @property
    def digest(self) -> str:
        """Stands for the examples and how they are scored: a log of other ones is another search's."""
        return hashlib.blake2b(repr((self.kind, self.examples)).encode(), digest_size=16).hexdigest()

    def prepare(self, base: Any) -> TokenTask:
        """With the base's own nats, where they are needed.

        Raises:
            InputError: an example is longer than the table of positions that the base has.
        """
        self._check_lengths(position_limit(base))
        if self.kind in ("exact", "choice"):
            return self
        every = range(self.size)
        found = self._grouped(every, answered(base, self.pairs(every), self.batch_size))
        return replace(self, reference=tuple(self._nats(every, found)))

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """As `Task.score`."""
        return self.scores(model, indices, answered(model, self.pairs(indices), self.batch_size))

    def pairs(self, indices: Sequence[int]) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Prompt and answer for all answers of these examples, in order."""
        chosen = [self.examples[index] for index in indices]
        return [(example.prompt, answer) for example in chosen for answer in example.answers]

    def scores(self, model: Any, indices: Sequence[int], answers: Sequence[likelihood.Answer]) -> list[float]:
        """The scores of examples from how the model sees the answers of their `pairs`.

        Raises:
            NonFiniteError: as `Task.score`.
        """
        found = self._grouped(indices, answers)
        if self.kind == "exact":
            return [float(group[0].is_greedy) for group in found]
        if self.kind == "choice":
            return [
                float(self._likeliest(index, group) == self.examples[index].right)
                for index, group in zip(indices, found, strict=True)
            ]
        nats, dense = self._nats(indices, found), [self.reference[index] for index in indices]
        if self.kind == "perplexity":
            return [math.exp(min(0.0, base - own)) for own, base in zip(nats, dense, strict=True)]
        uniform = math.log(model.config.get_text_config().vocab_size)
        return [
            min(1.0, max(0.0, (uniform - own) / max(uniform - base, 1e-6)))
            for own, base in zip(nats, dense, strict=True)
        ]

    def token_rows(self, indices: Sequence[int]) -> list[list[int]]:
        """Token ids of right answers after their prompts."""
        chosen = [self.examples[index] for index in indices]
        return [[*one.prompt, *one.answers[one.right]] for one in chosen]

    def _check_lengths(self, positions: int | None) -> None:
        for number, (prompt, answers, *_) in enumerate(self.examples, start=1):
            num_tokens = len(prompt) + max(map(len, answers)) - 1  # the last one is predicted and never read
            if positions is not None and num_tokens > positions:
                raise InputError(
                    f"task `{self.name}`: row {number} has {num_tokens} tokens, the model has {positions} "
                    "positions; shorten it or leave it out"
                )

    def _likeliest(self, index: int, found: Sequence[likelihood.Answer]) -> int:
        lengths = self.examples[index].lengths
        ranked = [(answer.log_likelihood / lengths[place], -place) for place, answer in enumerate(found)]
        return -max(ranked)[1]  # ties go to the first choice

    def _nats(self, indices: Sequence[int], found: Sequence[Sequence[likelihood.Answer]]) -> list[float]:
        return [
            -group[0].log_likelihood / len(self.examples[index].answers[0])
            for index, group in zip(indices, found, strict=True)
        ]

    def _grouped(
        self, indices: Sequence[int], answers: Sequence[likelihood.Answer]
    ) -> list[list[likelihood.Answer]]:
        """Of each example its answers, in order."""
        if any(math.isnan(answer.log_likelihood) for answer in answers):
            raise NonFiniteError(f"{self.name}: logits hold NaN or infinity")
        rest = iter(answers)
        return [list(islice(rest, len(self.examples[index].answers))) for index in indices]


@dataclass(frozen=True)
class FunctionTask:
    """A user's metric.

    Attributes:
        name: Its name.
        function: Of the model and the numbers of examples; returns a score in [0, 1] for each. Where workers
            are not forked it must be one that can be pickled.
        size: Examples that there are.
        strata: As in `Task`.
    """

    name: str
    function: Callable[[Any, Sequence[int]], Iterable[float]]
    size: int
    strata: Sequence[Hashable] | None = None

    @property
    def digest(self) -> str:
        """Stands for the function's own source, where there is one to read: a log of another one is another
        search's. What it calls, closes over or reads is not known.
        """
        return hashlib.blake2b(_source(self.function).encode(), digest_size=16).hexdigest()

    def prepare(self, base: Any) -> FunctionTask:
        """Nothing to know of the base."""
        return self

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """As `Task.score`."""
        return [float(value) for value in self.function(model, list(indices))]


def _source(function: Callable[..., Any]) -> str:
    """The text of a function, or of the class of an object that can be called; empty where it has none."""
    while isinstance(function, partial):
        function = function.func
    known = inspect.unwrap(function)
    try:
        return inspect.getsource(known if inspect.isroutine(known) else type(known))
    except (OSError, TypeError):  # typed at a prompt, or not Python
        return ""


def scored(model: Any, wanted: Sequence[tuple[Task, Sequence[int]]]) -> list[Sequence[float]]:
    """The scores of examples of several tasks. Those made of tokens share their passes: a few short examples
    of each don't fill one.

    Raises:
        NonFiniteError: as `Task.score`.
    """
    pairs = [
        task.pairs(indices) if isinstance(task, TokenTask) and task.batch_size is None else []
        for task, indices in wanted
    ]
    answers = iter(answered(model, list(chain.from_iterable(pairs))))
    return [
        task.scores(model, indices, list(islice(answers, len(own))))
        if isinstance(task, TokenTask) and own
        else task.score(model, indices)
        for (task, indices), own in zip(wanted, pairs, strict=True)
    ]


def answered(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int | None = None
) -> list[likelihood.Answer]:
    """How a model sees answers after their prompts, in their order."""
    found = dict(chain.from_iterable(likelihood.answers(model, pairs, batch_size)))
    return [found[place] for place in range(len(pairs))]


def equal_rows(rows: Iterable[Sequence[int]]) -> list[Any]:
    """Token ids as batches of rows of one length, the shortest first: nothing is padded."""
    import torch

    lengths: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    return [
        torch.tensor(group[begin : begin + likelihood.MAX_BATCH])
        for _, group in sorted(lengths.items())
        for begin in range(0, len(group), likelihood.MAX_BATCH)
    ]


def example_order(task: Task, seed: int) -> list[int]:
    """The order in which a task's examples are used: seeded, each subtask spread evenly over it."""
    rng = random.Random(derive(seed, "examples", task.name))
    groups: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(task.strata or [None] * task.size):
        groups.setdefault(stratum, []).append(index)
    placed = []
    for group in groups.values():
        rng.shuffle(group)
        placed += [((place + 0.5) / len(group), rng.random(), index) for place, index in enumerate(group)]
    return [index for _, _, index in sorted(placed)]


def checked(task: Task, values: Sequence[float], count: int) -> list[float]:
    """The scores of `count` examples.

    Raises:
        InputError: a score is NaN or outside [0, 1], or there are too many or too few; names the task.
    """
    values = [float(value) for value in values]
    if len(values) != count:
        raise InputError(f"task `{task.name}`: returned {len(values)} scores for {count} examples")
    for value in values:
        if not 0.0 <= value <= 1.0:
            raise InputError(
                f"task `{task.name}`: scored {value}, expected 0..1; wrap your metric: cost must be 1 - score"
            )
    return values
