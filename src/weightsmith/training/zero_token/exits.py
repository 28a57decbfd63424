"""Who leaves the cycles early, and by what.

A criterion gives every token a number after a cycle. With `zero_attention` (mean attention of the middle
layers to the zero token) a token is done when it is above the threshold; with the others, which measure what
the cycle changed, when it is below. Tokens of one row leave together (`sequence`), all rows together
(`batch`), or each token for itself (`token`); padding never holds others back.

Source  arXiv:2502.12214 for zero attention; relative change of the state, entropy and divergence of the
        prediction are those of recurrent-depth models (arXiv:2502.05171), read here from the state as it is,
        without the tail layers.
Letters B rows, T tokens, V vocabulary, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ReadOut = Callable[[Tensor], Tensor]
"""Logits (B, T, V) from a state (B, T, D)."""


def signal(
    criterion: str, share_BT: Tensor | None, before_BTD: Tensor, after_BTD: Tensor, read_out: ReadOut | None
) -> Tensor:
    """What the criterion says of each token (B, T), float32.

    Args:
        criterion: One of `options.CRITERIA`.
        share_BT: Mean attention to the zero token in this cycle.
        before_BTD: The state before the cycle.
        after_BTD: The state after it.
        read_out: For `entropy` and `kl`.
    """
    if criterion == "zero_attention":
        assert share_BT is not None  # the model refuses the criterion where it has no zero tokens
        return share_BT.float()
    if criterion == "latent_diff":
        change = (after_BTD.float() - before_BTD.float()).norm(dim=-1)
        return change / after_BTD.float().norm(dim=-1).clamp_min(1e-12)
    assert read_out is not None  # and these where it makes no predictions
    before, after = (read_out(state).float().log_softmax(-1) for state in (before_BTD, after_BTD))
    if criterion == "kl":
        return (after.exp() * (after - before)).sum(-1)
    return (_entropy(after) - _entropy(before)).abs()


def leaves(criterion: str, level: str, signal_BT: Tensor, threshold: float, real_BT: Tensor | None) -> Tensor:
    """Which tokens (B, T) are done.

    Args:
        criterion: Decides the side of the threshold.
        level: `batch`, `sequence` or `token`.
        signal_BT: From `signal`.
        threshold: Compared with it.
        real_BT: False for padding; None where there is none.
    """
    done = signal_BT > threshold if criterion == "zero_attention" else signal_BT < threshold
    if real_BT is not None:
        done = done | ~real_BT
    if level == "batch":
        return done.all().expand_as(done)
    return done.all(1, keepdim=True).expand_as(done) if level == "sequence" else done


def _entropy(log_BTV: Tensor) -> Tensor:
    return -(log_BTV.exp() * log_BTV).sum(-1)


def real_tokens(attention_mask: Any, tokens: int, past: int | Tensor) -> Tensor | None:
    """False for padding (B, T); None where nothing says what is.

    Args:
        attention_mask: (B, S), 0 for padding, or what `generate` makes of it for caches of fixed length: by
            kind of layer what each token sees, bool or to be added, (B, 1, T, S).
        tokens: T, the last of S, or of what was seen.
        past: Tokens before them.
    """
    if isinstance(attention_mask, dict):
        sees = attention_mask.get("full_attention", next(iter(attention_mask.values())))
        if sees is None or tokens == 1:  # what is generated is no padding
            return None
        own_1T1 = (torch.arange(tokens, device=sees.device) + past)[None, :, None]
        own_BT = sees[:, 0].gather(2, own_1T1.expand(len(sees), -1, 1))[..., 0]
        return own_BT if own_BT.dtype == torch.bool else own_BT == 0  # only padding doesn't see itself
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:].to(torch.bool)
