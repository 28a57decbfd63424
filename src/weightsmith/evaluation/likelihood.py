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

LOGITS_BYTES = 64 * 1024**2  # of one batch, fp32: small enough for the cache, enough for a matrix product
MAX_BATCH = 16


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
    """
    import torch

    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    longest = max((len(prompt) + len(answer) for prompt, answer in pairs), default=1)
    size = batch_size or default_batch_size(model, longest)
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        width = max(len(pairs[index][0]) + len(pairs[index][1]) for index in batch)
        keep = width - min(len(pairs[index][0]) for index in batch) + 1
        rows_BL = np.zeros((len(batch), width), np.int64)
        for row, index in enumerate(batch):
            ids = [*pairs[index][0], *pairs[index][1]]
            rows_BL[row, : len(ids)] = ids
        with _deciding(model, [list(pairs[index][0]) for index in batch]):
            logits_BKV = _logits(model, torch.from_numpy(rows_BL), keep).float().cpu()
        found = []
        for row, index in enumerate(batch):
            prompt, answer = pairs[index]
            first = len(prompt) - 1 - (width - keep)
            logits_V = logits_BKV[row, first : first + len(answer)]
            wanted = torch.tensor(answer)
            likelihood = logits_V.log_softmax(-1).gather(1, wanted[:, None]).double().sum()
            found.append((index, Answer(float(likelihood), bool((logits_V.argmax(-1) == wanted).all()))))
        yield found


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
    return max(1, min(MAX_BATCH, LOGITS_BYTES // (4 * length * vocabulary)))


def _runs(plan: list[_Window], size: int, key: Any) -> Iterator[list[_Window]]:
    """Pieces of at most `size` neighbours with one key."""
    begin = 0
    for end in range(1, len(plan) + 1):
        if end == len(plan) or end - begin == size or key(plan[end]) != key(plan[begin]):
            yield plan[begin:end]
            begin = end
