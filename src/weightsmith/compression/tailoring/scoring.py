"""Calibration tasks: a score in [0, 1] for each example, so that larger budgets go on where smaller ones
ended.

    exact        1 where greedy decoding gives exactly the answer
    choice       1 where the right choice is likeliest per character
    perplexity   exp(nll_dense - nll): the base's perplexity on the example over the model's, at most 1
    retained     (ln V - nll) / (ln V - nll_dense): the part of the base's gain over uniform guessing that is
                 left
    function     what a function of the model and of the examples' numbers returns

The score of a task at budget b is the mean over the first b examples of one seeded order, in which subtasks
are spread
evenly: a rung scores only what the rung below it did not.

Source  arXiv:2506.20480 takes the first b documents of each subtask instead. The mapping of perplexity is the
        reciprocal of the spec's formula, which grows where the model gets worse.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from weightsmith.errors import InputError
from weightsmith.evaluation import likelihood
from weightsmith.evaluation.likelihood import NonFiniteError
from weightsmith.runs.seeds import derive

Kind = Literal["exact", "choice", "perplexity", "retained"]


class Task(Protocol):
    """What a configuration is scored on."""

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

    def prepare(self, base: Any) -> TokenTask:
        """With the base's own nats, where they are needed."""
        if self.kind in ("exact", "choice"):
            return self
        return replace(self, reference=tuple(self._nats(base, range(self.size))))

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """As `Task.score`."""
        if self.kind == "exact":
            return [float(found[0].is_greedy) for found in self._answers(model, indices)]
        if self.kind == "choice":
            return [
                float(self._likeliest(index, found) == self.examples[index].right)
                for index, found in zip(indices, self._answers(model, indices), strict=True)
            ]
        nats, dense = self._nats(model, indices), [self.reference[index] for index in indices]
        if self.kind == "perplexity":
            return [math.exp(min(0.0, base - own)) for own, base in zip(nats, dense, strict=True)]
        uniform = math.log(model.config.get_text_config().vocab_size)
        return [
            min(1.0, max(0.0, (uniform - own) / max(uniform - base, 1e-6)))
            for own, base in zip(nats, dense, strict=True)
        ]

    def token_batches(self, indices: Sequence[int]) -> list[Any]:
        """Right answers after their prompts as batches of rows of one length: nothing is padded."""
        chosen = [self.examples[index] for index in indices]
        return equal_rows([[*one.prompt, *one.answers[one.right]] for one in chosen])

    def _likeliest(self, index: int, found: Sequence[likelihood.Answer]) -> int:
        lengths = self.examples[index].lengths
        ranked = [(answer.log_likelihood / lengths[place], -place) for place, answer in enumerate(found)]
        return -max(ranked)[1]  # ties go to the first choice

    def _nats(self, model: Any, indices: Sequence[int]) -> list[float]:
        return [
            -found[0].log_likelihood / len(self.examples[index].answers[0])
            for index, found in zip(indices, self._answers(model, indices), strict=True)
        ]

    def _answers(self, model: Any, indices: Sequence[int]) -> list[list[likelihood.Answer]]:
        """Of each example its answers, in order."""
        pairs, owner = [], []
        for place, index in enumerate(indices):
            for answer in self.examples[index].answers:
                pairs.append((self.examples[index].prompt, answer))
                owner.append(place)
        flat: list[Any] = [None] * len(pairs)
        for batch in likelihood.answers(model, pairs, self.batch_size):
            for pair, answer in batch:
                if math.isnan(answer.log_likelihood):
                    raise NonFiniteError(f"{self.name}: logits hold NaN or infinity")
                flat[pair] = answer
        found: list[list[likelihood.Answer]] = [[] for _ in indices]
        for place, answer in zip(owner, flat, strict=True):
            found[place].append(answer)
        return found


@dataclass(frozen=True)
class FunctionTask:
    """A user's metric.

    Attributes:
        name: Its name.
        function: Of the model and the numbers of examples; returns a score in [0, 1] for each. It must be one
            that can be pickled where there are several workers.
        size: Examples that there are.
        strata: As in `Task`.
    """

    name: str
    function: Callable[[Any, Sequence[int]], Iterable[float]]
    size: int
    strata: Sequence[Hashable] | None = None

    def prepare(self, base: Any) -> FunctionTask:
        """Nothing to know of the base."""
        return self

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """As `Task.score`."""
        return [float(value) for value in self.function(model, list(indices))]


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
