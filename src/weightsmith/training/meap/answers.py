"""MEAP for fine-tuning: copies of rows with a part of each long answer masked, whose loss counts that part.

Source   arXiv:2502.07490, section 3 (fine-tuning), and the authors' code: positions inside the answer, its
         closing token excepted, and labels at the masked tokens only. Decided here: the rule holds for each
         answer of a conversation, which keeps its history (the code trains each turn without those before
         it); what is protected is never masked and doesn't count, wherever in an answer it stands; and the
         first token of a document is no answer, since nothing predicts it.
Letters  B rows, T tokens of a row, C copies, R answers that are long enough
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.encoding import IGNORED, joined, parted
from weightsmith.training.meap.options import MEAPOptions
from weightsmith.training.meap.selection import choose_in_runs
from weightsmith.training.meap.tokens import check_mask_id

WEIGHTS = "loss_weights"
"""Key of a batch that says what each label counts, where copies count otherwise than originals."""
_OF_MAPS = ("mask_ratio", "exact_count", "min_answer_tokens")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_NOT_BY_TOKEN = (*_LENGTHS, "max_length_q", "max_length_k", "num_items_in_batch")


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


def with_copies(
    batch: dict[str, Any], masked: Tensor, mask_token_id: int, options: MEAPOptions, pad_token_id: int
) -> dict[str, Any]:
    """The batch with a masked copy of each row, or of each document, that has something to hide.

    Args:
        batch: What a collator made, with labels.
        masked: Bool (B, T): what the copies hide.
        mask_token_id: By what.
        options: The layout, and what a copy's labels count.
        pad_token_id: Fills rows up where originals and copies share one.

    Raises:
        InputError: an entry of the batch that belongs to rows or tokens in no known way.
    """
    batch = dict(batch)
    if not masked.any():
        if options.copy_loss_weight != 1:
            batch[WEIGHTS] = torch.ones_like(batch["labels"], dtype=torch.float32)
        return batch
    masked = masked.to(batch["labels"].device)
    hidden = {
        "input_ids": torch.where(masked, mask_token_id, batch["input_ids"]),
        "labels": torch.where(masked, batch["labels"], IGNORED),
    }
    if options.copy_loss_weight != 1:
        batch[WEIGHTS] = torch.ones_like(batch["labels"], dtype=torch.float32)
        hidden[WEIGHTS] = torch.full_like(batch[WEIGHTS], options.copy_loss_weight)
    if options.layout != "separate":
        return _behind(batch, hidden, masked, pad_token_id, visible=options.layout == "concat_visible")
    if is_flat(batch):
        return _as_documents(batch, hidden, masked)
    return _as_rows(batch, hidden, masked)


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
        row = int(np.searchsorted(stops, masks[0], side="right"))
        raise InputError(
            f"mask token {mask_token_id} is in the clean text, {len(masks)} times, first in row {row}; "
            "take a token that text doesn't have"
        )
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


def is_flat(batch: dict[str, Any]) -> bool:
    """Whether the batch is one row of documents, told apart by positions or lengths and not by padding."""
    if "cu_seq_lens_q" in batch:
        return True
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or batch["labels"].shape[0] != 1:
        return False
    if isinstance(mask, Tensor) and not mask.bool().all():
        return False  # positions of padding start anew too
    return bool(document_starts(positions.shape, positions).sum() > 1)


def _as_rows(batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor) -> dict[str, Any]:
    rows = masked.any(1).nonzero().flatten()
    number = masked.shape[0]
    made = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or key in _NOT_BY_TOKEN:
            made[key] = value
        elif value.shape[0] == number:
            made[key] = torch.cat([value, hidden.get(key, value)[rows]])
        else:
            raise InputError(
                f"MEAP copies rows, but `{key}` has {value.shape[0]} entries for {number} rows; take it out "
                "of the batch, or use mode `pretrain`"
            )
    return made


def _as_documents(batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor) -> dict[str, Any]:
    length = masked.shape[1]
    if "cu_seq_lens_q" in batch:
        edges = batch["cu_seq_lens_q"].tolist()
    else:
        edges = [*np.flatnonzero(document_starts(masked.shape, batch["position_ids"])[0]).tolist(), length]
    spans = list(itertools.pairwise(edges))
    copied = [(start, stop) for start, stop in spans if masked[0, start:stop].any()]
    taken = torch.cat([torch.arange(start, stop) for start, stop in copied]).to(masked.device)
    made = {}
    for key, value in batch.items():
        if key in _LENGTHS:
            further = torch.tensor([stop - start for start, stop in copied], device=value.device).cumsum(0)
            made[key] = torch.cat([value, (value[-1] + further).to(value.dtype)])
        elif not isinstance(value, Tensor) or key in _NOT_BY_TOKEN:
            made[key] = value
        elif value.ndim >= 2 and value.shape[:2] == (1, length):
            more = hidden.get(key, value)[:, taken]
            if key == "seq_idx":
                sizes = torch.tensor([stop - start for start, stop in copied])
                numbers = torch.arange(len(copied)).repeat_interleave(sizes).to(value)
                more = (value.max() + 1 + numbers)[None].to(value.dtype)
            made[key] = torch.cat([value, more], dim=1)
        else:
            raise InputError(
                f"MEAP copies documents, but `{key}` of shape {tuple(value.shape)} doesn't belong to the "
                f"{length} tokens of the row; take it out of the batch, or use mode `pretrain`"
            )
    return made


def _behind(
    batch: dict[str, Any], hidden: dict[str, Tensor], masked: Tensor, pad_token_id: int, *, visible: bool
) -> dict[str, Any]:
    """Rows `original, copy, padding`. Models keep documents apart by positions that start anew, as they do in
    packed rows, as long as there is no attention mask.
    """
    number, length = masked.shape
    strange = [
        key
        for key, value in batch.items()
        if key in _NOT_BY_TOKEN or not isinstance(value, Tensor) or value.shape != (number, length)
    ]
    if strange:
        raise InputError(
            f"layout concat: `{strange[0]}` doesn't belong to the {number} rows of {length} tokens; take "
            "layout `separate`"
        )
    real = batch.get("attention_mask", torch.ones_like(masked)).bool()
    positions = batch.get("position_ids", real.long().cumsum(1) - 1)
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    lines: dict[str, list[Tensor]] = {}
    for row in range(number):
        twice = bool(masked[row].any())
        for key, value in {**batch, "position_ids": positions}.items():
            if key == "attention_mask":
                continue
            own = value[row][real[row]]
            copy = hidden.get(key, value)[row][real[row]]
            lines.setdefault(key, []).append(torch.cat([own, copy]) if twice else own)
    width = max(len(line) for line in lines["input_ids"])
    # A cache of keys and values, which models make unasked, would keep them from looking at positions.
    made: dict[str, Any] = {"use_cache": False}
    for key, listed in lines.items():
        filled = [
            torch.cat(
                [
                    line,
                    # Padding is a document of its own, behind everything that counts.
                    torch.arange(width - len(line)).to(line)
                    if key == "position_ids"
                    else line.new_full((width - len(line),), fill.get(key, 0)),
                ]
            )
            for line in listed
        ]
        made[key] = torch.stack(filled)
    if visible:
        del made["position_ids"]
        sizes = torch.tensor([len(line) for line in lines["input_ids"]])
        mask = torch.arange(width) < sizes[:, None]
        made["attention_mask"] = mask.long().to(masked.device)
    return made


@contextlib.contextmanager
def weighing(network: Any, weights: Tensor) -> Iterator[None]:
    """Within, label i counts `weights[i]` wherever the network takes its loss: also where it takes one at
    several depths, and whatever it adds to it stays.

    Args:
        network: A causal model of transformers with the usual `loss_function`.
        weights: (B, T), for the labels of the batch that it is called on.

    Raises:
        InputError: the network's loss is that of other labels, or none by `loss_function`.
    """
    usual, name = network.loss_function, type(network).__name__
    is_taken = False

    def loss(
        logits: Tensor, labels: Tensor | None, *_: Any, num_items_in_batch: Any = None, **__: Any
    ) -> Tensor:
        nonlocal is_taken
        if labels is None or labels.shape != weights.shape:
            found = "none" if labels is None else tuple(labels.shape)
            raise InputError(
                f"copy_loss_weight: {name} takes its loss of labels of shape {found}, expected "
                f"{tuple(weights.shape)}: all of a batch on one device"
            )
        is_taken = True
        return weighted_loss(logits, labels, weights, num_items_in_batch)

    network.loss_function = loss
    try:
        yield
    finally:
        network.loss_function = usual
    if not is_taken:
        raise InputError(
            "copy_loss_weight other than 1 weighs labels in a model's loss_function, which "
            f"{name} didn't call"
        )


def weighted_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, total: Tensor | float | None = None
) -> Tensor:
    """Next-token cross-entropy in which label i counts `weights[i]`.

    Args:
        logits: (B, T, V).
        labels: (B, T), as a causal model of transformers takes them: label i is predicted at i - 1.
        weights: (B, T).
        total: What to divide by; by default the sum of the weights of all labels.
    """
    targets = labels[:, 1:].to(logits.device)
    weights = weights[:, 1:].to(logits.device) * (targets != IGNORED)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    total = weights.sum() if total is None else torch.as_tensor(total, device=logits.device)
    return (losses * weights.flatten()).sum() / total
