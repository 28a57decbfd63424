"""Log-likelihoods under a causal model: of long texts in windows, and of short answers after a prompt.

Rule for texts: a text begins with the model's start token (its end token where it has none), so its first
token is predicted too. It is read in windows of `length` tokens that advance by half their length; each
window scores the tokens that no window before it scored. So every token is scored once, with at least `length
/ 2` tokens of context wherever the text has them, and the last window is moved back to end with the text.

A model with a method `for_prompts(prompts)`, a context manager, is told the prompts that what it scores goes
on
from: a mediated model chooses its experts by them.

Letters  B windows, L tokens of a window, K scored positions at its end, V vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightsmith.errors import InputError

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 64 * 1024**2
"""Of one batch, fp32."""
MAX_BATCH = 16
"""Windows at once, and rows of a model that chooses its weights for each."""
_TOKENS = {"cpu": 1024}
"""Of one batch, by kind of device: on a CPU, enough for matrix products and few enough for the cache that
what stands between them is read from. From widths of 96 to 1,024, twice as many took up to twice as long.
"""
_TOKENS_ELSEWHERE = 16_384
_PADDED = 16
"""Padding of so small a part of a batch costs as much as a pass of its own would."""


Row = tuple[int, tuple[int, ...]]
"""Tokens of the prompt; the ids that go into the model."""


class NonFiniteError(ArithmeticError):
    """Logits held NaN or infinity."""


class Answer(NamedTuple):
    """How a model sees one answer.

    Attributes:
        log_likelihood: Natural logarithm of the answer's probability after its prompt.
        is_greedy: Whether greedy decoding would give exactly this answer: every token is the likeliest after
            the right ones before it.
    """

    log_likelihood: float
    is_greedy: bool


class _Window(NamedTuple):
    text: int
    start: int  # in the inputs, which are the start token and all tokens but the last
    scored: int  # positions at its end


def start_token(tokenizer: Any) -> int:
    """The token that a text begins with.

    Raises:
        InputError: the tokenizer has neither a start nor an end token.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise InputError("the tokenizer has neither bos_token nor eos_token: the first token has no context")
    return token


def windows(num_tokens: int, length: int) -> list[tuple[int, int]]:
    """(first input, scored positions at the end) of each window over `num_tokens` predictions."""
    if num_tokens <= length:
        return [(0, num_tokens)] if num_tokens else []
    stride = max(1, length // 2)
    found = [(0, length)]
    done = length
    while done < num_tokens:
        end = min(done + stride, num_tokens)
        found.append((end - length, end - done))
        done = end
    return found


def text_nats(
    model: Any, texts: Sequence[np.ndarray], start: int, length: int, batch_size: int | None = None
) -> Iterator[float]:
    """Negative log-likelihood of each batch of windows, in nats; their sum is that of all texts.

    Args:
        model: A causal language model.
        texts: Token ids of each text.
        start: The token each begins with.
        length: L, tokens of a window.
        batch_size: B; by default what keeps the logits small.
    """
    import torch

    sequences = [np.concatenate([[start], tokens]).astype(np.int64) for tokens in texts]
    plan = [
        _Window(text, first, scored)
        for text, tokens in enumerate(texts)
        for first, scored in windows(len(tokens), length)
    ]
    # Windows of one size side by side: nothing is padded, and only the logits that count are computed.
    plan.sort(key=lambda window: (min(length, len(texts[window.text])), window.scored))
    size = batch_size or default_batch_size(model, length)
    for batch in _runs(plan, size, key=lambda window: min(length, len(texts[window.text]))):
        width = min(length, len(texts[batch[0].text]))
        keep = max(window.scored for window in batch)
        inputs_BL = np.stack([sequences[w.text][w.start : w.start + width] for w in batch])
        targets_BK = np.stack(
            [sequences[w.text][w.start + 1 + width - keep : w.start + 1 + width] for w in batch]
        )
        counted_BK = np.arange(keep) >= keep - np.array([[w.scored] for w in batch])
        # A text is one request, whose prompt is as long as the context that every scored token has at least.
        begins = [sequences[w.text][: max(1, length // 2)].tolist() for w in batch]
        with _deciding(model, begins):
            logits_BKV = _logits(model, torch.from_numpy(inputs_BL), keep)
        nats_BK = torch.nn.functional.cross_entropy(
            logits_BKV.flatten(0, 1).float(),
            torch.from_numpy(targets_BK).flatten().to(logits_BKV.device),
            reduction="none",
        )
        yield float(nats_BK.double().cpu()[torch.from_numpy(counted_BK).flatten()].sum())


def answers(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int | None = None
) -> Iterator[list[tuple[int, Answer]]]:
    """(index, Answer) of (prompt, answer) token ids, batch by batch, in order of length.

    Prompts must begin with the start token. Rows are padded on the right, where a causal model can't look.
    Answers to one prompt that differ in their last token alone, such as the letters of a question with
    choices, are read off one row.
    """
    import torch

    rows: dict[Row, list[int]] = {}
    for index, (prompt, answer) in enumerate(pairs):
        rows.setdefault((len(prompt), (*prompt, *answer[:-1])), []).append(index)
    for batch in _row_batches(model, sorted(rows, key=lambda row: len(row[1])), batch_size):
        width = len(batch[-1][1])
        keep = width - min(start for start, _ in batch) + 1
        inputs_BL = np.zeros((len(batch), width), np.int64)
        for row, (_, ids) in enumerate(batch):
            inputs_BL[row, : len(ids)] = ids
        with _deciding(model, [list(ids[:start]) for start, ids in batch]):
            logits_BKV = _logits(model, torch.from_numpy(inputs_BL), keep)
        found = [(index, row) for row, key in enumerate(batch) for index in rows[key]]
        counts = [len(pairs[index][1]) for index, _ in found]
        numbers_T = np.repeat(np.arange(len(found)), counts)  # which answer a token is of
        starts = [len(pairs[index][0]) - 1 - (width - keep) for index, _ in found]
        place_T = np.arange(sum(counts)) + np.repeat(np.array(starts) - np.cumsum([0, *counts[:-1]]), counts)
        row_T = np.repeat([row for _, row in found], counts)
        token_T = np.fromiter((token for index, _ in found for token in pairs[index][1]), np.int64)
        logits_TV = logits_BKV[torch.from_numpy(row_T), torch.from_numpy(place_T)].float()
        wanted_T = torch.from_numpy(token_T).to(logits_TV.device)
        nats_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])[:, 0].double().cpu().numpy()
        missed_T = (logits_TV.argmax(-1) != wanted_T).cpu().numpy()
        likelihoods = np.bincount(numbers_T, nats_T, len(found))
        misses = np.bincount(numbers_T, missed_T, len(found))
        yield [
            (index, Answer(float(likelihood), not wrong))
            for (index, _), likelihood, wrong in zip(found, likelihoods, misses, strict=True)
        ]


def _row_batches(model: Any, rows: Sequence[Row], size: int | None) -> Iterator[list[Row]]:
    """Rows, the shortest first, as batches of `size`; by default as large as is fast, with small logits."""
    most = size or (MAX_BATCH if hasattr(model, "for_prompts") else len(rows))
    tokens, vocabulary = _max_tokens(model), model.config.get_text_config().vocab_size
    batch: list[Row] = []
    shortest = 0
    for row in rows:
        start, ids = row
        if batch:
            count, kept = len(batch) + 1, len(ids) - min(shortest, start) + 1
            padding = len(batch) * (len(ids) - len(batch[-1][1]))
            fits = count * len(ids) <= tokens and padding <= tokens // _PADDED
            fits = fits and 4 * count * kept * vocabulary <= LOGITS_BYTES
            if len(batch) == most or not (fits or size):
                yield batch
                batch = []
        shortest = min(shortest, start) if batch else start
        batch.append(row)
    if batch:
        yield batch


def _max_tokens(model: Any) -> int:
    return _TOKENS.get(model.device.type, _TOKENS_ELSEWHERE)


def _logits(model: Any, inputs_BL: torch.Tensor, keep: int) -> torch.Tensor:
    """Logits (B, K, V) of the last `keep` positions."""
    import torch

    with torch.inference_mode():
        options = {"logits_to_keep": keep} if _takes_logits_to_keep(model) else {}
        return model(input_ids=inputs_BL.to(model.device), use_cache=False, **options).logits[:, -keep:]


def _deciding(model: Any, prompts: list[list[int]]) -> AbstractContextManager[Any]:
    """A model that chooses its weights for each sequence chooses by the prompts, never by the answers."""
    return model.for_prompts(prompts) if hasattr(model, "for_prompts") else nullcontext()


def _takes_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def default_batch_size(model: Any, length: int) -> int:
    """Rows of `length` tokens whose logits stay small."""
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(MAX_BATCH, _max_tokens(model) // length, LOGITS_BYTES // (4 * length * vocabulary)))


def _runs(plan: list[_Window], size: int, key: Any) -> Iterator[list[_Window]]:
    """Pieces of at most `size` neighbours with one key."""
    begin = 0
    for end in range(1, len(plan) + 1):
        if end == len(plan) or end - begin == size or key(plan[end]) != key(plan[begin]):
            yield plan[begin:end]
            begin = end
