"""What a run trains on: token windows that are a pure function of seed and index.

Data is a task of the test-bed, a local file (text, JSON lines, Parquet) or a hub data set. Documents are
tokenised with the model's own tokenizer, joined with its end token between them and cut into windows; each
pass over a source shifts the cuts and shuffles the windows anew. Questions with answers (the bed's skills,
files with a `prompt` column) fill a window one after the other, and only answers, end token included, count
in the loss.

Nothing here keeps a position: example `i` of a run can be made at once and in any process, so a run that
continues from its checkpoint reads what it would have read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from weightsmith.errors import InputError
from weightsmith.runs.seeds import derive
from weightsmith.testbed import alphabet, domains, skills, tasks
from weightsmith.training.encoding import IGNORED, fitting, token_ids
from weightsmith.training.sources import DataSource

Data = str | DataSource | Sequence[str | DataSource]
Split = Literal["train", "calibration"]
Pair = tuple[Sequence[int], Sequence[int]]


class WindowSource(Protocol):
    """One source of windows; `index` counts the windows that a run has taken from it."""

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of one window, both int64 and of the run's sequence length."""


class Mixture:
    """The examples of a run, in order: a map-style data set whose item `i` depends on `i` and the seed alone.

    Args:
        sources: The sources to mix.
        weights: Share of each in the examples; positive.
        num_examples: Length.
        seed: Decides which source gives which example.
    """

    def __init__(
        self, sources: Sequence[WindowSource], weights: Sequence[float], num_examples: int, seed: int
    ) -> None:
        self.sources = sources
        edges = np.cumsum(np.asarray(weights, np.float64) / sum(weights))[:-1]
        draws = np.random.default_rng(derive(seed, "mixture")).random(num_examples)
        self._choice = np.searchsorted(edges, draws, side="right").astype(np.int16)
        self._index = np.empty(num_examples, np.int64)
        for number in range(len(sources)):
            mine = self._choice == number
            self._index[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, example: int) -> dict[str, np.ndarray]:
        ids, labels = self.sources[self._choice[example]].window(int(self._index[example]))
        return {"input_ids": ids, "labels": labels}


class Shuffled:
    """Endless passes over `count` things, each pass in an order of its own."""

    def __init__(self, count: int, room: int, seed: int) -> None:
        self._count, self._room, self._seed = count, room, seed
        self._pass = -1
        self._shift, self._order = 0, np.arange(count)

    def at(self, index: int) -> tuple[int, int]:
        """(number of the thing, shift of the pass in 0..room)."""
        number, position = divmod(index, self._count)
        if number != self._pass:
            rng = np.random.default_rng(derive(self._seed, "pass", number))
            self._pass, self._shift = number, int(rng.integers(self._room + 1))
            self._order = rng.permutation(self._count)
        return int(self._order[position]), self._shift


class PackedText:
    """Documents joined by the end token and cut into windows; every token is a label."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._tokens, self._length = tokens, length
        # Half a window stays free, so that the cuts of every pass can lie elsewhere.
        count = max(1, (len(tokens) - length // 2) // length)
        self._passes = Shuffled(count, max(0, len(tokens) - count * length), seed)

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `WindowSource`; a text shorter than a window is padded."""
        number, shift = self._passes.at(index)
        start = shift + number * self._length
        ids = self._tokens[start : start + self._length].astype(np.int64)
        return _padded(ids, ids, self._length)


class PackedPairs:
    """Prompts and answers, as many as fit into a window; only answers are labels. A pair that is longer than
    a window loses the beginning of its prompt, then the end of its answer.
    """

    def __init__(self, pairs: Iterable[Pair], length: int, eos: int, seed: int) -> None:
        everything = list(pairs)
        order = np.random.default_rng(derive(seed, "packing")).permutation(len(everything))
        queue = iter([everything[number] for number in order])
        self._windows: list[tuple[np.ndarray, np.ndarray]] = []
        pair = next(queue, None)
        while pair is not None:
            taken, pair = _fill(pair, queue, length)
            self._windows.append(_pair_window(taken, length, eos))
        self._passes = Shuffled(len(self._windows), 0, seed)

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `WindowSource`."""
        return self._windows[self._passes.at(index)[0]]


class SkillQuestions:
    """Endless questions of some skills of the test-bed, drawn anew for every window."""

    def __init__(self, names: Sequence[str], length: int, seed: int, split: Split = "train") -> None:
        self._names, self._length, self._seed, self._split = names, length, seed, split

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `WindowSource`."""
        rng = random.Random(derive(self._seed, "window", index))
        questions = self._questions(rng)
        taken, _ = _fill(next(questions), questions, self._length)
        return _pair_window(taken, self._length, alphabet.EOS)

    def _questions(self, rng: random.Random) -> Iterator[Pair]:
        while True:
            question, answer = skills.draw(rng.choice(self._names), self._split, rng)
            # Lists: their items go into lists.
            yield alphabet.encode(question).tolist(), alphabet.encode(answer).tolist()


def sources(data: Data) -> tuple[DataSource, ...]:
    """Data as the user wrote it, as a tuple of sources with test-bed sets taken apart.

    Raises:
        InputError: empty, a weight that is not positive, or a name that is nothing known.
    """
    listed = (data,) if isinstance(data, (str, DataSource)) else tuple(data)
    found: list[DataSource] = []
    for entry in listed:
        entry = DataSource(source=entry) if isinstance(entry, str) else entry
        entry.check()
        if entry.kind == "testbed":
            members = tasks.expand(entry.source)
            share = entry.weight / len(members)
            found += [DataSource(source=member, weight=share) for member in members]
        else:
            found.append(entry)
    if not found:
        raise InputError("data: nothing to train on")
    return tuple(found)


def mixture(
    own: Data,
    replayed: Data,
    replay: float,
    *,
    tokenizer: Any,
    length: int,
    num_examples: int,
    seed: int,
) -> Mixture:
    """The examples of a run.

    Args:
        own: What to train on.
        replayed: What to repeat so that it is not forgotten; unused when `replay` is 0.
        replay: Fraction of the examples taken from `replayed`.
        tokenizer: The model's tokenizer.
        length: Tokens of a window.
        num_examples: Examples of the whole run.
        seed: Everything follows from it.

    Raises:
        InputError: as `sources`, `DataSource.texts` and `.pairs`, or the tokenizer has no end token.
    """
    made: list[WindowSource] = []
    weights: list[float] = []
    for part, share, data in (("own", 1 - replay, own), ("replay", replay, replayed)):
        if share == 0:
            continue
        entries = sources(data)
        total = sum(entry.weight for entry in entries)
        for number, entry in enumerate(entries):
            made.append(_window_source(entry, tokenizer, length, derive(seed, part, number)))
            weights.append(share * entry.weight / total)
    return Mixture(made, weights, num_examples, seed)


def held_out_batches(
    data: Data, tokenizer: Any, *, length: int, batch_size: int, batches: int, seed: int
) -> list[dict[str, Any]]:
    """Batches to measure losses on: of test-bed tasks the calibration pools, of anything else all of it.

    Arguments and errors as `mixture`.
    """
    entries = sources(data)
    made = [
        _window_source(entry, tokenizer, length, derive(seed, number), "calibration")
        for number, entry in enumerate(entries)
    ]
    examples = Mixture(made, [entry.weight for entry in entries], batches * batch_size, seed)
    return [
        collate([examples[start + index] for index in range(batch_size)])
        for start in range(0, batches * batch_size, batch_size)
    ]


def collate(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Examples as one batch of tensors."""
    import torch

    return {key: torch.from_numpy(np.stack([example[key] for example in examples])) for key in examples[0]}


def _window_source(
    data: DataSource, tokenizer: Any, length: int, seed: int, split: Split = "train"
) -> WindowSource:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the model's tokenizer has no end token (eos_token): documents can't be told apart")
    character_level = tokenizer.get_vocab() == alphabet.VOCABULARY
    if data.kind == "testbed":
        if tasks.TASKS[data.source] == "domain":
            texts: Iterable[str] = domains.documents(data.source, split)
            return PackedText(_joined(texts, tokenizer, eos, character_level), length, seed)
        if not character_level:
            raise InputError(f"data `{data.source}`: skills need a model with the test-bed's tokenizer")
        return SkillQuestions((data.source,), length, seed, split)
    if data.prompt is not None:
        ids = token_ids(tokenizer, itertools.chain.from_iterable(data.pairs()))
        return PackedPairs(zip(ids, ids, strict=True), length, eos, seed)
    return PackedText(_joined(data.texts(), tokenizer, eos, character_level), length, seed)


def _joined(texts: Iterable[str], tokenizer: Any, eos: int, character_level: bool) -> np.ndarray:
    """Token ids of all texts, the end token after each, as uint32 (uint8 for the bed's tokenizer)."""
    pieces: list[np.ndarray] = []
    end = np.array([eos], np.uint8 if character_level else np.uint32)
    # A look-up gives the ids of the bed's tokenizer without the seconds that it takes for megabytes.
    found = map(alphabet.encode, texts) if character_level else token_ids(tokenizer, texts)
    for ids in found:
        pieces += [np.asarray(ids, end.dtype), end]
    return np.concatenate(pieces)


def _fill(first: Pair, more: Iterator[Pair], length: int) -> tuple[list[Pair], Pair | None]:
    """Pairs for one window, which starts with an end token and has one after each answer; and the pair left
    over.
    """
    taken, used = [first], 2 + len(first[0]) + len(first[1])
    for pair in more:
        used += 1 + len(pair[0]) + len(pair[1])
        if used > length:
            return taken, pair
        taken.append(pair)
    return taken, None


def _pair_window(pairs: list[Pair], length: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    ids, labels = [eos], [IGNORED]
    for prompt, answer in pairs:
        prompt, answer = fitting(prompt, answer, length - 2)
        ids += [*prompt, *answer, eos]
        labels += [IGNORED] * len(prompt) + [*answer, eos]
    return _padded(np.array(ids, np.int64), np.array(labels, np.int64), length, eos)


def _padded(
    ids: np.ndarray, labels: np.ndarray, length: int, filler: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Padding comes last, where a causal model can't see it, and is no label."""
    missing = length - len(ids)
    if missing <= 0:
        return ids, labels
    return (
        np.pad(ids, (0, missing), constant_values=filler),
        np.pad(labels, (0, missing), constant_values=IGNORED),
    )
