"""Which tokens MEAP masks: a pure function of a seed, a row's number and a token's place.

Problem  A causal model trained on clean text leans on the nearest tokens. MEAP hides a few of the tokens it
         reads and asks for the same predictions, so that more distant ones have to tell.
Method   Every place gets a key: SplitMix64 of (seed, row, place). The K eligible places with the smallest
         keys are masked, K = max(1, floor(ratio x eligible)). Keys of a row are all different, since
         SplitMix64 is a bijection, so K is exact.
Source   arXiv:2502.07490, section 3, and the authors' code. Left open there, decided here: keys are
         stateless and the same on every device, where the code reseeds Python's global generator.
Cost     O(B T) integers; no copy between host and device, no wait for one.
Letters  B rows, T tokens of a row, K masked tokens of a row, N eligible ones
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.meap.options import check_ratio
from weightsmith.training.meap.selection import (
    GOLDEN,
    LOWEST,
    NEVER,
    ROUNDS,
    WORD,
    chance,
    choose_in_rows,
    masked_count,
)
from weightsmith.training.meap.tokens import check_mask_id

# torch's integers have a sign.
_GOLDEN = GOLDEN - WORD
_ROUNDS = tuple((shift, factor - WORD) for shift, factor in ROUNDS)


@overload
def meap_mask_inputs(
    input_ids: Tensor,
    mask_token_id: int,
    mask_ratio: float = ...,
    eligible: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    exclude_last: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    per_row: bool = ...,
    exact_count: bool = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def meap_mask_inputs(
    input_ids: Tensor,
    mask_token_id: int,
    mask_ratio: float = ...,
    eligible: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    exclude_last: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    per_row: bool = ...,
    exact_count: bool = ...,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def meap_mask_inputs(
    input_ids: Tensor,
    mask_token_id: int,
    mask_ratio: float = 0.15,
    eligible: Tensor | None = None,
    attention_mask: Tensor | None = None,
    exclude_last: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    per_row: bool = True,
    exact_count: bool = True,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token ids with some of them replaced by the mask token; labels stay the clean ids.

    Args:
        input_ids: Integer ids (B, T), on any device. Never written to.
        mask_token_id: The id that replaces.
        mask_ratio: Share of each row's eligible tokens.
        eligible: Bool (B, T): what may be masked; everything by default.
        attention_mask: (B, T), 0 for padding, which is never eligible.
        exclude_last: The last eligible token of each row is not.
        seed: Decides the places. An int, or a 0-d int64 tensor, with which `torch.compile` compiles once.
        generator: A seed is drawn from it instead.
        per_row: Rows have places of their own.
        exact_count: K is exact; otherwise each token is masked with probability `mask_ratio`.
        return_mask: Return the bool mask (B, T) too.

    Returns:
        Ids of the same shape, dtype and device; with `return_mask`, and where they are masked.

    Raises:
        InputError: ids that are not integers in a matrix, a mask of another shape, a ratio outside 0..1, a
            mask token that ids can't hold, or not exactly one of `seed` and `generator`.

    Example:
        >>> ids = torch.arange(10)[None]
        >>> meap_mask_inputs(ids, 99, 0.3, seed=0).eq(99).sum().item()
        2
    """
    check_ratio(mask_ratio)
    check_mask_id(mask_token_id)
    allowed = _allowed(input_ids, eligible, attention_mask)
    if mask_token_id > torch.iinfo(input_ids.dtype).max:
        raise InputError(f"mask_token_id {mask_token_id} doesn't fit input_ids of {input_ids.dtype}")
    if (seed is None) == (generator is None):
        raise InputError(
            "meap_mask_inputs needs either `seed` or `generator`: no global generator is touched"
        )
    if generator is not None:
        seed = torch.randint(LOWEST, NEVER, (), generator=generator, device=generator.device)
    assert seed is not None
    if allowed is None and exclude_last:
        allowed_T = torch.arange(input_ids.shape[1], device=input_ids.device) < input_ids.shape[1] - 1
        allowed = allowed_T.expand(input_ids.shape)
    elif allowed is None:
        allowed = torch.ones_like(input_ids, dtype=torch.bool)
    elif exclude_last:
        allowed = without_last(allowed)
    chosen = choose(allowed, mask_ratio, seed, per_row=per_row, exact_count=exact_count)
    masked = filled(input_ids, chosen, mask_token_id)
    return (masked, filled(torch.zeros_like(allowed), chosen, True)) if return_mask else masked


def choose(
    allowed: Tensor, ratio: float, seed: int | Tensor, *, per_row: bool = True, exact_count: bool = True
) -> Tensor:
    """A random part of the `allowed` places of each row.

    Args:
        allowed: Bool (B, T).
        ratio: Share of them, at least one where `ratio` is not 0.
        seed: Decides which.
        per_row: Rows have keys of their own.
        exact_count: Exactly that share; otherwise that probability.

    Returns:
        Bool (B, T); or int64, places in the flattened rows, which a CPU fills in sooner.
    """
    if ratio == 0 or allowed.numel() == 0:
        return torch.zeros_like(allowed)
    if ratio == 1:
        return allowed.clone()
    # A graph has to be torch all through.
    if exact_count and allowed.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(choose_in_rows(allowed.numpy(), ratio, int(seed), per_row))
    keys = position_keys(allowed.shape, seed, per_row, allowed.device)
    if not exact_count:
        return (keys < chance(ratio)) & allowed
    keys = torch.where(allowed, keys, NEVER)
    count_B = allowed.sum(1)
    wanted_B = (count_B.double() * ratio + 1e-9).floor().long().clamp(min=1)
    # No row has more than this many, so the shape needs no look at the counts.
    smallest = keys.topk(masked_count(allowed.shape[1], ratio), dim=1, largest=False).values
    threshold_B1 = smallest.gather(1, wanted_B[:, None] - 1)
    return (keys <= threshold_B1) & allowed


def filled(rows: Tensor, chosen: Tensor, value: int | bool) -> Tensor:
    """A copy of `rows` (B, T) with `value` at what `choose` chose."""
    if chosen.dtype == torch.bool:
        return torch.where(chosen, value, rows)
    return (
        rows.clone(memory_format=torch.contiguous_format)
        .flatten()
        .index_fill_(0, chosen, value)
        .view(rows.shape)
    )


def without_last(allowed: Tensor) -> Tensor:
    """`allowed` (B, T) without the last True of each row."""
    if not allowed.shape[1]:
        return allowed
    if allowed.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = allowed.numpy().copy()
        padded = np.flatnonzero(~kept[:, -1])
        kept[:, -1] = False
        kept[padded, -1 - kept[padded, ::-1].argmax(1)] = False
        return torch.from_numpy(kept)
    places = torch.arange(allowed.shape[1], device=allowed.device)
    last_B1 = torch.where(allowed, places, -1).amax(1, keepdim=True)
    return allowed & (places != last_B1)


def is_any(ids: Tensor, wanted: Collection[int]) -> Tensor:
    """Where `ids` are one of a few; several times faster than `torch.isin` for a handful."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for one in wanted:
        found |= ids == one
    return found


def authors_places(step: int, length: int, ratio: float, cycle: int = 51) -> list[int]:
    """The places that the authors' code masks in every row of a step.

    Args:
        step: Number of the step, from 0.
        length: T, tokens of a row; its last place is never drawn.
        ratio: Share of all T.
        cycle: Different masks in a run.
    """
    count = masked_count(length, ratio)
    return random.Random(50 + step % cycle).sample(range(length - 1), min(count, length - 1))


def check_ids(ids: Tensor) -> None:
    """Refuse what is no matrix of token ids.

    Raises:
        InputError: another dtype or shape.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        dtype = str(ids.dtype).removeprefix("torch.")
        raise InputError(
            f"input_ids: expected integers of shape (rows, tokens), got {dtype} of shape {tuple(ids.shape)}"
        )


def _allowed(ids: Tensor, eligible: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    check_ids(ids)
    allowed = None
    for name, given in (("eligible", eligible), ("attention_mask", attention_mask)):
        if given is None:
            continue
        if given.shape != ids.shape:
            raise InputError(
                f"{name}: expected the shape {tuple(ids.shape)} of input_ids, got {tuple(given.shape)}"
            )
        allowed = given.bool() if allowed is None else allowed & given.bool()
    return allowed


def position_keys(shape: torch.Size, seed: int | Tensor, per_row: bool, device: torch.device) -> Tensor:
    """Keys, int64: (B, T), or (1, T) for all rows."""
    start = seed.to(device) if isinstance(seed, Tensor) else signed(seed)
    rows = torch.arange(1, (shape[0] if per_row else 1) + 1, device=device)
    row_B1 = mixed(rows * _GOLDEN + start)[:, None]
    return mixed(row_B1 + torch.arange(shape[1], device=device) * _GOLDEN)


def mixed(state: Tensor) -> Tensor:
    """SplitMix64's output function. torch shifts signed numbers, so copies of the sign are cut off."""
    for shift, factor in _ROUNDS:
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def signed(number: int) -> int:
    """A number modulo 2^64 as torch stores it."""
    return (number - LOWEST) % WORD + LOWEST
