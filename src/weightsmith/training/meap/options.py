"""Options of MEAP. Nothing here imports torch: recipes read it to check a page."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.errors import InputError, nearest

RATIOS = {"pretrain": 0.15, "sft": 0.10}
"""The paper's share of masked tokens in each mode."""
MUCH = 0.5
"""Above this share the rest hardly tells what the text is about."""


@dataclass(frozen=True, kw_only=True)
class MEAPOptions:
    """What MEAP masks; the defaults are the paper's.

    Attributes:
        mode: `pretrain` masks the inputs of every row. `sft` leaves rows as they are and adds, for each with
            a long answer, a copy with part of the answer masked, whose loss counts the masked tokens only.
        mask_ratio: Share of the tokens that are masked, 0 to 1; by default 0.15, and 0.1 of an answer.
        per_row: Each row has positions of its own; `false` gives all rows of a batch the same ones. Answers
            always have their own.
        exact_count: Exactly `floor(mask_ratio x eligible)` tokens of a row or of an answer, at least one;
            `false` decides token by token.
        exclude_last: The last token that a row has is never masked. Answers have their closing token for it.
        protect_special: Start, end and other special tokens are never masked. Padding and the special token
            that closes an answer never are.
        seed_cycle: The authors' code has this many different masks (51) and begins again; `null` for none.
        min_answer_tokens: Answers with fewer tokens that may be masked than this get no masked copy.
        layout: Where a copy stands: in a row of its own, behind the original in one row without seeing it
            (`concat`, the same loss; with FlashAttention only for batches of one row), or seeing it
            (`concat_visible`, where it can be looked up: an experiment).
        copy_loss_weight: What a token of a copy counts in the mean loss.
        mask_token: The tokenizer's token to mask with, such as a reserved one; by default its mask token.
        add_mask_token: Add a token where the tokenizer has none for it, and take it away after training.
    """

    mode: Literal["pretrain", "sft"] = "pretrain"
    mask_ratio: float | None = None
    per_row: bool = True
    exact_count: bool = True
    exclude_last: bool = True
    protect_special: bool = True
    seed_cycle: int | None = None
    min_answer_tokens: int = 51
    layout: Literal["separate", "concat", "concat_visible"] = "separate"
    copy_loss_weight: float = 1.0
    mask_token: str | None = None
    add_mask_token: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
                )
        if self.mask_ratio is not None:
            check_ratio(self.mask_ratio)
        for name in ("seed_cycle", "min_answer_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.copy_loss_weight < math.inf:
            raise InputError(f"copy_loss_weight must be at least 0 and finite, got {self.copy_loss_weight}")
        if self.mode == "pretrain":
            for name in ("min_answer_tokens", "layout", "copy_loss_weight"):
                if getattr(self, name) != getattr(MEAPOptions, name):
                    raise InputError(f"{name} is about answers: it needs mode `sft`")
        else:
            for name in ("seed_cycle", "per_row", "exclude_last"):
                if getattr(self, name) != getattr(MEAPOptions, name):
                    raise InputError(f"{name} is about whole rows: it needs mode `pretrain`")
        if self.mask_token is not None and self.add_mask_token:
            raise InputError("mask_token names a token that is there: leave add_mask_token out")

    @property
    def ratio(self) -> float:
        """`mask_ratio`, or the paper's for this mode."""
        return RATIOS[self.mode] if self.mask_ratio is None else self.mask_ratio

    @classmethod
    def authors(cls, **changes: Any) -> MEAPOptions:
        """What the authors' pre-training code does: one of 51 masks for all rows, special tokens included."""
        return cls.of({"per_row": False, "protect_special": False, "seed_cycle": 51, **changes})

    @classmethod
    def of(cls, options: MEAPOptions | Mapping[str, Any] | None = None, **fields: Any) -> MEAPOptions:
        """`options` (or the defaults) with single fields replaced.

        Raises:
            InputError: a field that doesn't exist, or a value out of range; names it.
        """
        if isinstance(options, Mapping):
            fields, options = {**options, **fields}, None
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(
                    f"MEAP: no option `{name}`{nearest(name, known) or ';'} known: {', '.join(known)}"
                )
        return dataclasses.replace(options, **fields) if options else cls(**fields)


_CHOICES = {"mode": ("pretrain", "sft"), "layout": ("separate", "concat", "concat_visible")}


def check_ratio(ratio: float) -> None:
    """Refuse what is no share.

    Raises:
        InputError: not a number in 0..1; a percentage is told so.
    """
    is_number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not is_number or not 0 <= ratio <= 1:
        percent = is_number and 1 < ratio <= 100
        hint = f"; {ratio:g} percent are {ratio / 100:g}" if percent else ""
        raise InputError(f"mask_ratio must be in 0..1, got {ratio}{hint}")
