"""Attention with one more slot whose value is zero: what flows there is written nowhere.

With s_j the scores of a query, z its score against the zero key and LSE = logsumexp_j s_j,

    a0 = e^z / (e^z + sum_j e^s_j) = sigmoid(z - LSE)
    out = sum_j a_j v_j = (1 - a0) * Attention(q, K, V)

so the slot needs no concatenation, no place in a cache and no column in a mask: one more dot product a query
and a scale. Where a kernel gives LSE, it is used (`lse`); elsewhere the slot is concatenated (`concat`).

Backward, CPU kernel: it forms P = exp(s - L) and dS = P (dO V^T - rowsum(dO * O)) from the L and O that it is
given. With L = logaddexp(LSE, z) these are the probabilities beside the zero slot; the gradient of a0 adds
a0 dA to the row sums, for which O is moved along dO. So one call of the kernel gives all of it.

Source  arXiv:2502.12214 (idea); the identity is checked in the tests.
Letters B rows, H query heads, G key heads, T queries, S keys, D head width
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.errors import InputError

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_TINY, _SMALLEST = 1e-12, 1e-18
LSE_BACKENDS = ("sdpa", "flex_attention")
BACKENDS = ("eager", *LSE_BACKENDS)


class Zeroed(NamedTuple):
    """Attention beside the zero token.

    Attributes:
        out_BTHD: The heads' outputs.
        share_BHT: a0, float32 (float64 for float64 queries).
        weights_BHTS: Attention to the keys, which sums up to 1 - a0; from the eager backend only.
    """

    out_BTHD: Tensor
    share_BHT: Tensor
    weights_BHTS: Tensor | None = None


def zero_scores(q_BHTD: Tensor, key_GD: Tensor, bias_H: Tensor | None, scaling: float) -> Tensor:
    """Z (B, H, T): scores of queries against the zero key of their key head, float32 at least."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    key_HD = key_GD[:, None].expand(-1, q_BHTD.shape[1] // key_GD.shape[0], -1).flatten(0, 1)
    z = (q_BHTD * key_HD[:, None].to(q_BHTD.dtype)).sum(-1, dtype=wide) * scaling
    return z if bias_H is None else z + bias_H[:, None].to(wide)


def computed_in(x: Tensor) -> torch.dtype:
    """The type in which attention of `x` is computed: autocast's where that is on, or its own.

    Kernels called by their own name are not cast by autocast, under which rotated queries and keys are wider
    than values.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def additive_mask(mask: Any, dtype: torch.dtype) -> Any:
    """A mask as numbers of `dtype` to add; others than tensors as they are.

    The lowest number and not minus infinity, which the lowest of a wider type would become: a row without any
    key then has LSE = lowest, so a0 = 1, and an output of zero without a special case.
    """
    if not isinstance(mask, Tensor) or mask.dtype == dtype:
        return mask
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp_min(lowest)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)


def choose(backend: str, implementation: str, device: str, dropout: float) -> str:
    """How the slot is computed: `eager`, `concat`, `lse`.

    Raises:
        InputError: the backend has no way; names it and those that do.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"attn_implementation: {backend} gives no log-sum-exp, which the zero token needs; expected one "
            f"of {', '.join(BACKENDS)}"
        )
    if backend == "eager":
        if implementation == "lse":
            raise InputError(
                "zero_token_impl: lse needs a kernel that gives log-sum-exp, and attn_implementation eager "
                f"has none; take {' or '.join(LSE_BACKENDS)}, or zero_token_impl concat"
            )
        return "eager"
    if backend == "flex_attention":
        if implementation == "concat":
            raise InputError("zero_token_impl: concat is for sdpa and eager, found flex_attention")
        return "lse"
    possible = device == "cpu" and dropout == 0
    if implementation == "lse" and not possible:
        raise InputError(
            f"zero_token_impl: lse with sdpa works on the CPU without dropout, found device {device} and "
            f"dropout {dropout}; take zero_token_impl concat, or attn_implementation flex_attention"
        )
    return "lse" if possible and implementation != "concat" else "concat"


def zero_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    z_BHT: Tensor,
    mask: Any,
    *,
    scaling: float,
    backend: str = "sdpa",
    implementation: str = "auto",
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Zeroed:
    """Attention in which every query also sees a slot of score `z_BHT` and value zero.

    It is computed in autocast's type where autocast is on, or in that of the values.

    Args:
        q_BHTD: Queries, rotated.
        k_BGSD: Keys, rotated; H is a multiple of G.
        v_BGSD: Values.
        z_BHT: Scores of the zero token, as `zero_scores` gives them.
        mask: Numbers to add to scores (B or 1, 1 or H, T, S), booleans (True is seen), a `BlockMask` for
            flex_attention, or None.
        scaling: Of the scores of keys.
        backend: `eager`, `sdpa` or `flex_attention`.
        implementation: `auto`, `lse` or `concat`.
        is_causal: Without a mask: query t sees keys up to t.
        dropout: On attention; the zero slot's is dropped like others, except in `lse`, which has none.

    Raises:
        InputError: the backend has no log-sum-exp.
    """
    way = choose(backend, implementation, q_BHTD.device.type, dropout)
    dtype = computed_in(v_BGSD)
    q_BHTD, k_BGSD, v_BGSD = q_BHTD.to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
    mask = additive_mask(mask, dtype)
    if mask is not None:
        is_causal = False
    if backend == "flex_attention":
        return _flex(q_BHTD, k_BGSD, v_BGSD, z_BHT, mask, scaling, is_causal)
    if is_causal and k_BGSD.shape[2] > q_BHTD.shape[2]:  # a cache made in advance, of which this is the start
        k_BGSD, v_BGSD = k_BGSD[:, :, : q_BHTD.shape[2]], v_BGSD[:, :, : q_BHTD.shape[2]]
    if way == "lse":
        return _kernel(q_BHTD, k_BGSD, v_BGSD, z_BHT, mask, scaling, is_causal)
    group = q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(group, 1) for x in (k_BGSD, v_BGSD))
    if is_causal:
        mask = _causal(q_BHTD, k_BHSD)
    if way == "eager":
        return _eager(q_BHTD, k_BHSD, v_BHSD, z_BHT, mask, scaling, dropout)
    return _concat(q_BHTD, k_BHSD, v_BHSD, z_BHT, mask, scaling, dropout)


class _KernelAttention(torch.autograd.Function):
    """The CPU kernel with the zero slot in both directions."""

    @staticmethod
    def forward(ctx: Any, q, k, v, z, mask, scaling: float, is_causal: bool):
        out, lse = _KERNEL(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scaling)
        share = torch.sigmoid(z - lse)
        out *= torch.sigmoid(lse - z).unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, torch.logaddexp(lse, z), share, mask)
        ctx.scaling, ctx.is_causal = scaling, is_causal
        ctx.set_materialize_grads(False)
        return out, share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        q, k, v, out, total, share, mask = ctx.saved_tensors
        grad, grad_share = grad_outputs
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        rows = (grad.to(total.dtype) * out).sum(-1)
        grad_z = -share * rows
        if grad_share is not None:
            grad_z = grad_z + share * (1 - share) * grad_share
            shift = (share * grad_share).unsqueeze(-1)
            # Rows whose gradient is zero have no direction to move along: they get one of no weight.
            least = (_TINY * shift.abs()).clamp_min(_SMALLEST) * (shift != 0)
            first = torch.zeros_like(grad)
            first[..., :1] = least
            grad = torch.where(grad.abs().amax(-1, keepdim=True) < least, first, grad)
            wide = grad.to(total.dtype)
            move = torch.where(shift == 0, 0, shift / wide.square().sum(-1, keepdim=True))
            out = (out + wide * move).to(out.dtype)
        dq, dk, dv = _KERNEL_BACKWARD(
            grad, q, k, v, out, total, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scaling
        )
        return dq, dk, dv, grad_z, None, None, None


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
) -> Zeroed:
    # Keys of grouped heads are read where they lie, by this kernel in both directions.
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, z)):
        out, share = _KernelAttention.apply(q, k, v, z, mask, scaling, is_causal)
    else:
        out, lse = _KERNEL(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scaling)
        share = torch.sigmoid(z - lse)
        out *= torch.sigmoid(lse - z).unsqueeze(-1).to(out.dtype)
    return Zeroed(out.transpose(1, 2), share)


def _flex(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Any, scaling: float, is_causal: bool) -> Zeroed:
    from torch.nn.attention import flex_attention as flex

    score = None
    if isinstance(mask, Tensor):
        added = mask.expand(q.shape[0], q.shape[1], -1, -1)

        def score(value: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return value + added[b, h, t, s]

        mask = None
    elif is_causal:
        lowest = torch.finfo(torch.float32).min

        def score(value: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return torch.where(s <= t, value, lowest)

    out, aux = _flex_function(q.device.type)(
        q,
        k,
        v,
        score_mod=score,
        block_mask=mask,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=flex.AuxRequest(lse=True),
    )
    # A row without any key: its output and log-sum-exp are whatever the kernel left there.
    empty = torch.isneginf(aux.lse) | torch.isnan(aux.lse)
    lse = aux.lse.masked_fill(empty, torch.finfo(aux.lse.dtype).min).to(z.dtype)
    out = out.masked_fill(empty.unsqueeze(-1), 0) * torch.sigmoid(lse - z).unsqueeze(-1).to(out.dtype)
    return Zeroed(out.transpose(1, 2), torch.sigmoid(z - lse))


@functools.cache
def _flex_function(device: str) -> Any:
    """Compiled on accelerators, where the plain form would write all scores down; as it is on the CPU."""
    from torch.nn.attention import flex_attention as flex

    return flex.flex_attention if device == "cpu" else torch.compile(flex.flex_attention)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Zeroed:
    scores = (q @ k.mT) * scaling
    if mask is not None:
        scores = scores + mask
    both = torch.cat([z.unsqueeze(-1), scores.to(z.dtype)], -1).softmax(-1)
    share, weights = both[..., 0], both[..., 1:].to(q.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return Zeroed((weights @ v).transpose(1, 2), share, weights)


def _concat(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Zeroed:
    """The slot as one more key whose score is written into the mask, and a channel of ones that tells 1 - a0.

    The zero key itself could stand in the keys; its score in the mask also carries the bias, and any `z`.
    """
    rows, heads, queries, width = q.shape
    ones = v.new_zeros(rows, heads, v.shape[2], 8)  # kernels want widths that divide by eight
    ones[..., 0] = 1
    k = torch.cat([k.new_zeros(rows, heads, 1, width), k], 2)
    v = torch.cat([v.new_zeros(rows, heads, 1, width + 8), torch.cat([v, ones], -1)], 2)
    seen = q.new_zeros(rows, heads, queries, k.shape[2] - 1) if mask is None else mask
    both = torch.cat([z.unsqueeze(-1).to(q.dtype), seen.expand(rows, heads, queries, -1)], -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=both, dropout_p=dropout, scale=scaling)
    return Zeroed(out[..., :width].transpose(1, 2), 1 - out[..., width].to(z.dtype))


def _causal(q: Tensor, k: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return additive_mask(seen[None, None], q.dtype)
