"""A model that is in memory as lm-evaluation-harness knows models. Needs lm_eval when it is imported.

Its own adapter for Hugging Face models does the work. Ours tells each pass not to fill a cache of keys and
values, which lets a search start passes after the layers that it has run before; chooses batches that keep
the logits small; and refuses logits that hold NaN, which the harness would take for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from weightsmith.errors import InputError
from weightsmith.evaluation import likelihood

_DEFAULT_NEW_TOKENS = 256  # the harness's, where a page says nothing


def answer(
    model: Any, tokenizer: Any, requests: Sequence[Any], task: str, batch_size: int | None = None
) -> None:
    """Put a model's answers into the harness's requests.

    Args:
        model: A causal language model.
        tokenizer: Of the model.
        requests: Instances of the harness.
        task: For messages.
        batch_size: Rows at once; by default what keeps the logits small.

    Raises:
        InputError: the model has too few positions for what a page generates.
        NonFiniteError: logits held NaN.
    """
    wrapped = _Resident(model, tokenizer, batch_size)
    kinds: dict[str, list[Any]] = {}
    for request in requests:
        kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
    for kind, group in kinds.items():
        if kind == "generate_until":
            _check_room(group, wrapped.max_length, task)
        for request, given in zip(group, getattr(wrapped, kind)(group, disable_tqdm=True), strict=True):
            number = given[0] if isinstance(given, tuple) else given
            if isinstance(number, float) and math.isnan(number):
                raise likelihood.NonFiniteError(f"{task}: logits hold NaN or infinity")
            request.resps.append(given)


def _check_room(requests: Sequence[Any], positions: int, task: str) -> None:
    for request in requests:
        wanted = request.arguments[1].get("max_gen_toks", _DEFAULT_NEW_TOKENS)
        if wanted >= positions:
            raise InputError(
                f"task `{task}`: generates up to {wanted} tokens (`max_gen_toks` of its page), the model has "
                f"{positions} positions in all"
            )


class _Resident(HFLM):
    """The harness's adapter around a loaded model."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        self._given = batch_size
        # A model that chooses its experts by the prompt must not see padding in it.
        self._chooses = hasattr(model, "for_prompts")
        rows = 1 if self._chooses else batch_size or likelihood.MAX_BATCH
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        longest = min(self.max_length, max(len(before) + len(after) for _, before, after in requests))
        if self._chooses:
            return self._by_prompts(requests)
        self.batch_size_per_gpu = self._given or likelihood.default_batch_size(self.model, longest)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)

    def _by_prompts(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = []
        for _, before, after in requests:
            row = [*before, *after][-(self.max_length + 1) :]
            pairs.append((row[: len(row) - len(after)], row[len(row) - len(after) :]))
        found: dict[int, likelihood.Answer] = {}
        for batch in likelihood.answers(self.model, pairs, self._given):
            found.update(batch)
        return [(found[place].log_likelihood, found[place].is_greedy) for place in range(len(pairs))]

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids=inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with torch.inference_mode():
            return super()._model_generate(
                context, max_length, stop, logits_processor=LogitsProcessorList([_Finite()]), **options
            )


class _Finite(LogitsProcessor):
    """Greedy decoding would take the first NaN for the likeliest token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise likelihood.NonFiniteError("logits hold NaN or infinity")
        return scores
