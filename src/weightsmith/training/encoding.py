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
    # Each column of its own: texts of one kind are found sooner than long ones between short ones.
    columns = [_read(token_ids(tokenizer, texts)) for texts in (prompts, answers)]
    if max_length is not None:
        pairs = zip(*(parted(*column) for column in columns), strict=True)
        fitted = [fitting(prompt, answer, max_length - 1) for prompt, answer in pairs]
        columns = [joined([pair[side] for pair in fitted]) for side in (0, 1)]
    (prompt_ids, prompt_R), (answer_ids, answer_R) = columns
    lengths = prompt_R + answer_R + 1
    ids = np.full(lengths.sum(), end)
    is_label = np.repeat(np.arange(2 * len(lengths)) % 2 == 1, np.stack([prompt_R, answer_R + 1], 1).ravel())
    ids[~is_label] = prompt_ids
    is_answer = is_label.copy()
    is_answer[np.cumsum(lengths) - 1] = False
    ids[is_answer] = answer_ids
    return {"input_ids": parted(ids, lengths), "labels": parted(np.where(is_label, ids, IGNORED), lengths)}


def _read(rows: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What `joined` gives, of rows that are read as they come: lists of numbers that are kept until all are
    there cost more than reading them.
    """
    read, lengths = array("q"), array("q")
    for row in rows:
        read.fromlist(row)
        lengths.append(len(row))
    return np.frombuffer(read, np.int64), np.frombuffer(lengths, np.int64)


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


def fitting(prompt: Any, answer: Any, room: int) -> tuple[Any, Any]:
    """Both, lists or arrays, in `room` tokens: the prompt's beginning goes first, then the answer's end."""
    answer = answer[:room]
    return prompt[max(0, len(prompt) + len(answer) - room) :], answer


def _is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizers library does all of a call; a subclass may do things of its own before it."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in _CALLS
    )
