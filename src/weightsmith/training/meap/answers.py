"""MEAP for fine-tuning: which tokens of each long answer masked copies hide; `copies.py` makes the copies.

Source   arXiv:2502.07490, section 3 (fine-tuning), and the authors' code: positions inside the answer, its
         closing token excepted, and labels at the masked tokens only. Decided here: the rule holds for each
         answer of a conversation, which keeps its history (the code trains each turn without those before
         it); what is protected is never masked and doesn't count, wherever in an answer it stands; and the
         first token of a document is no answer, since nothing predicts it.
Letters  B rows, T tokens of a row, R answers that are long enough
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.encoding import IGNORED, joined, parted
from weightsmith.training.meap.options import MEAPOptions
from weightsmith.training.meap.selection import choose_in_runs
from weightsmith.training.meap.tokens import check_mask_id, in_clean_text

_OF_MAPS = ("mask_ratio", "exact_count", "min_answer_tokens")


def find_answers(
    labels: np.ndarray, starts: np.ndarray, closing: Collection[int] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of labels, without the token that closes each.

    Args:
        labels: (N,), -100 outside of answers; rows lie behind one another.
        starts: Int64: the first tokens of rows and of documents in them.
        closing: Ids of tokens that close an answer; one at the end of a run is no part of it.

    Returns:
        Where there is an answer, bool (N,), and where each begins and ends, int64, (R,) each.
    """
    framed = np.zeros(len(labels) + 2, bool)
    is_answer = framed[1:-1]
    np.not_equal(labels, IGNORED, out=is_answer)
    is_answer[starts] = False
    # No run crosses the edge of a row, whose first token is none; they begin and end in turns.
    edge = np.flatnonzero(framed[1:] != framed[:-1])
    start, stop = edge[::2], edge[1::2]
    if closing:
        stop = stop - np.isin(labels[stop - 1], list(closing))
        is_answer[stop[stop < edge[1::2]]] = False
    return is_answer, start, stop


def document_starts(shape: Iterable[int], position_ids: Tensor | None) -> np.ndarray:
    """Bool (B, T): the first token of each document of each row."""
    starts = np.zeros(tuple(shape), bool)
    starts[:, :1] = True
    if position_ids is not None:
        starts[:, 1:] |= np.diff(position_ids.cpu().numpy(), axis=1) != 1
    return starts


def masked_answers(
    batch: dict[str, Any],
    options: MEAPOptions,
    seed: Any,
    closing: Collection[int] = (),
    protected: Collection[int] = (),
) -> Tensor:
    """Bool (B, T) on the CPU: the tokens of long answers that copies hide.

    Args:
        batch: With labels, which are the tokens of the answers.
        options: What is long, and how much is hidden.
        seed: Decides which tokens.
        closing: Ids of tokens that close an answer; one at its end is no part of it.
        protected: Ids that are never hidden, and don't count towards an answer's length.
    """
    labels = batch["labels"].cpu().numpy()
    rows, length = labels.shape
    hidden = _hidden(
        labels.ravel(),
        np.arange(rows) * length,
        np.flatnonzero(document_starts(labels.shape, batch.get("position_ids"))),
        options,
        int(seed),
        closing=closing,
        protected=protected,
    )
    masked_BT = np.zeros(labels.shape, bool)
    masked_BT.ravel()[hidden] = True
    return torch.from_numpy(masked_BT)


def _hidden(
    labels: np.ndarray,
    begins: np.ndarray,
    starts: np.ndarray,
    options: MEAPOptions,
    seed: int,
    *,
    closing: Collection[int] = (),
    protected: Collection[int] = (),
) -> np.ndarray:
    """Which of the tokens of rows of all lengths, which begin at `begins`, copies hide, in order."""
    is_answer, start_R, stop_R = find_answers(labels, starts, closing)
    for token in protected:
        is_answer &= labels != token
    tokens = np.flatnonzero(is_answer)
    count_R = np.searchsorted(tokens, stop_R) - np.searchsorted(tokens, start_R)
    long = count_R >= options.min_answer_tokens
    if not long.all():
        tokens = tokens[np.repeat(long, count_R)]
        start_R, count_R = start_R[long], count_R[long]
    begin_R = begins[np.searchsorted(begins, start_R, side="right") - 1]
    return choose_in_runs(tokens, begin_R, count_R, options.ratio, seed, exact_count=options.exact_count)


def meap_sft_map(
    examples: Mapping[str, Sequence[Sequence[int]]],
    *,
    mask_token_id: int,
    protected_ids: Collection[int] = (),
    seed: int = 0,
    **options: Any,
) -> dict[str, list[Any]]:
    """Rows and their masked copies, for `datasets.Dataset.map(..., batched=True)`: masks that stay the same
    in all epochs, where `DataCollatorForMEAP` draws new ones.

    Args:
        examples: Columns `input_ids` and `labels`, and others with an entry for each token.
        mask_token_id: What copies are masked with.
        protected_ids: Ids that are never masked and don't count towards an answer's length: the tokenizer's
            `all_special_ids`, so that the token that closes an answer stays, and placeholders of images.
        seed: Decides the masks. Give each batch its own (`with_indices=True`), or equal rows get equal masks.
        **options: `mask_ratio`, `exact_count` and `min_answer_tokens` of `MEAPOptions`.

    Returns:
        The columns, each original in front of its copy. Ids and labels are int64 arrays, an original's those
        given where they are such arrays; entries of other columns are those given, a copy's its original's.

    Raises:
        InputError: a missing column, ids that are no integers, a row with more or fewer ids than labels, the
            mask token in clean text, or an option that changes nothing here.
    """
    check_mask_id(mask_token_id)
    chosen = MEAPOptions.of({"mode": "sft", **options})
    for name in options:
        if name not in _OF_MAPS:
            raise InputError(f"meap_sft_map: {name} changes nothing here; expected {', '.join(_OF_MAPS)}")
    (ids, lengths), (labels, counts) = (_column(examples, key) for key in ("input_ids", "labels"))
    if not np.array_equal(lengths, counts):
        row = int(np.flatnonzero(lengths != counts)[0])
        raise InputError(f"row {row} has {lengths[row]} input_ids and {counts[row]} labels: expected as many")
    stops = np.cumsum(lengths)
    begins = stops - lengths
    masks = np.flatnonzero(ids == mask_token_id)
    if len(masks):
        raise in_clean_text(mask_token_id, len(masks), int(np.searchsorted(stops, masks[0], side="right")))
    hidden = _hidden(labels, begins, begins[lengths > 0], chosen, seed, protected=protected_ids)
    has_copy = (np.searchsorted(hidden, stops) > np.searchsorted(hidden, begins)).tolist()
    clean_ids, clean_labels = (
        _arrays(examples[key], numbers, lengths) for key, numbers in (("input_ids", ids), ("labels", labels))
    )
    masked_labels = np.full_like(labels, IGNORED)
    ids[hidden], masked_labels[hidden] = mask_token_id, labels[hidden]
    columns: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
        **{key: (column, column) for key, column in examples.items()},
        "input_ids": (clean_ids, parted(ids, lengths)),
        "labels": (clean_labels, parted(masked_labels, lengths)),
    }
    return {
        key: [
            row
            for clean, copy, copied in zip(originals, copies, has_copy, strict=True)
            for row in ((clean, copy) if copied else (clean,))
        ]
        for key, (originals, copies) in columns.items()
    }


def _column(examples: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    if key not in examples:
        raise InputError(f"meap_sft_map needs a column `{key}`; found: {', '.join(examples) or 'none'}")
    for row in examples[key]:
        if len(row):
            if (kind := np.asarray(row[:1]).dtype).kind not in "iu":
                raise InputError(f"{key}: expected integers, got {kind}")
            break
    return joined(examples[key])


def _arrays(rows: Sequence[Any], numbers: np.ndarray, lengths: np.ndarray) -> Sequence[np.ndarray]:
    """Rows as int64 arrays: those given where they are, or parts of a copy of all their numbers."""
    if {*map(type, rows)} == {np.ndarray} and {row.dtype for row in rows} == {np.dtype(np.int64)}:
        return rows
    return parted(numbers.copy(), lengths)
