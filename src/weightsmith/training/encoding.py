"""Texts as token ids, many at a time: what data sets are made of.

Cost     The tokenizers library gives ids alone when it is asked without offsets, on all cores; transformers'
         call asks for offsets, and for each text makes entries that nobody reads. Rows of pairs are parts of
         one array, filled at once: copying lists of numbers costs half as much as finding them.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from weightsmith.errors import InputError

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
_BATCH = 1000
_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus")


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids that `tokenizer(text, add_special_tokens=False)` gives, of each text in turn.

    Args:
        tokenizer: One of transformers. Nothing is cut or padded.
        texts: Read a batch at a time.
    """
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        if _is_plain(tokenizer):
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = tokenizer.split_special_tokens
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids
        else:
            # `verbose` off: documents may be longer than the model's window, they are cut afterwards.
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def encode_pairs(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], *, max_length: int | None = None
) -> dict[str, list[np.ndarray]]:
    """Rows to fine-tune on: prompt, answer, end token; what the prompt holds is no label.

    Args:
        tokenizer: One of transformers, with an end token. No template is put around the texts.
        prompts: One for each answer.
        answers: One for each prompt.
        max_length: Tokens of a row. A longer one loses the beginning of its prompt, then the end of its
            answer, never its end token.

    Returns:
        The columns `input_ids` and `labels`, for `datasets.Dataset.map(..., batched=True)`: an int64 array
        for each row.

    Raises:
        InputError: as many prompts as answers are needed, an end token, and room for one token before it.

    Example:
        >>> encode_pairs(tokenizer, ["2+2="], ["4"])["labels"]
        [array([-100, -100, -100, -100,   20,   97])]
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end token (eos_token), which closes an answer")
    if len(prompts) != len(answers):
        raise InputError(f"{len(prompts)} prompts and {len(answers)} answers: expected one for each")
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length: {max_length}, expected at least 2: a token and the end token")
    found = token_ids(tokenizer, itertools.chain.from_iterable(zip(prompts, answers, strict=True)))
    # Read as they come: lists of ids that are kept until all are there cost more than reading them.
    read, sizes = array("q"), []
    for question, answer in zip(found, found, strict=True):
        if max_length is not None:
            question, answer = fitting(question, answer, max_length - 1)
        answer.append(end)
        read.fromlist(question)
        read.fromlist(answer)
        sizes += (len(question), len(answer))
    ids = np.frombuffer(read, np.int64)
    is_label = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
    lengths = np.reshape(sizes, (-1, 2)).sum(1, dtype=np.int64)
    return {"input_ids": parted(ids, lengths), "labels": parted(np.where(is_label, ids, IGNORED), lengths)}


def joined(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all lengths as one array, int64, and how long each is."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if len(rows) and isinstance(rows[0], np.ndarray):
        return np.concatenate(rows).astype(np.int64, copy=False), lengths
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths


def parted(numbers: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """What was joined, as views: a row of each length."""
    stops = itertools.accumulate(lengths.tolist(), initial=0)
    return [numbers[start:stop] for start, stop in itertools.pairwise(stops)]


def fitting(prompt: Sequence[int], answer: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Both within `room` tokens: the beginning of the prompt goes first, then the end of the answer."""
    answer = list(answer[:room])
    return list(prompt[max(0, len(prompt) + len(answer) - room) :]), answer


def _is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizers library does all of a call; a subclass may do things of its own before it."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in _CALLS
    )
