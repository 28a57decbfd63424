"""The token that stands for hidden ones: found, added with a row of its own, taken away again."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import InputError, nearest

logger = logging.getLogger(__name__)

ADDED = "[MASK]"
MULTIPLE = 64  # rows of an embedding that grows; matrix units like it
_SPECIAL = ("pad", "eos", "bos", "unk")


@dataclass(frozen=True)
class MaskToken:
    """A mask token, and what was there before it was added.

    Attributes:
        token: Its text.
        id: Its id.
        rows: Rows of the embedding before; None where nothing was changed.
        spare: Values of the rows that the token took where the embedding had room: of the input embedding,
            and of the output embedding where it is another one.
        tokenizer: The tokenizer's state before.
        suppressed: The model's `generation_config.suppress_tokens` before.
    """

    token: str
    id: int
    rows: int | None = None
    spare: tuple[Tensor, ...] = ()
    tokenizer: dict[str, Any] | None = None
    suppressed: Any = None

    @property
    def is_added(self) -> bool:
        """Whether it was added, and can be taken away."""
        return self.rows is not None


def resolve_mask_token(
    tokenizer: Any, model: Any = None, token: str | None = None, *, add_mask_token: bool = False
) -> MaskToken:
    """The token to mask with.

    A named token; else the tokenizer's mask token; else, with `add_mask_token`, a new token `[MASK]`, whose
    rows are the mean of the old ones. An embedding that has no room for it grows to a multiple of 64. What is
    added is never generated, and `strip_mask_token` takes it away.

    Args:
        tokenizer: The model's tokenizer; gets the new token.
        model: A causal model of transformers; its embedding is checked and, for a new token, grown.
        token: A token that the tokenizer has, such as `<|reserved_special_token_7|>`.
        add_mask_token: Add one where there is none.

    Raises:
        InputError: no such token, none at all, one with another meaning, or one beyond the embedding; a token
            to add without a model, or to one whose embedding PEFT has wrapped.
    """
    if token is not None:
        known = tokenizer.get_vocab()
        if token not in known:
            raise InputError(
                f"mask_token: {_name(tokenizer)} has no token `{token}`{nearest(token, known)}; expected one "
                "of its reserved tokens"
            )
        found = MaskToken(token, known[token])
    elif tokenizer.mask_token_id is not None:
        found = MaskToken(tokenizer.mask_token, tokenizer.mask_token_id)
    elif add_mask_token:
        if model is None:
            raise InputError(
                "add_mask_token=True gives the new token a row of the model's embedding: pass the model too"
            )
        _check_plain(model, "resolve_mask_token adds a token before get_peft_model")
        return _added(tokenizer, model)
    else:
        raise InputError(
            f"tokenizer {_name(tokenizer)} has no mask token; pass mask_token_id or add_mask_token=True"
        )
    check_mask_id(found.id, tokenizer, model)
    return found


def in_clean_text(id: int, times: int, row: int) -> InputError:
    """What to raise where clean text has the mask token: no one could tell its own from those that hide."""
    return InputError(
        f"mask token {id} is in the clean text, {times} times, first in row {row}; take a token that text "
        "doesn't have"
    )


def check_mask_id(id: int, tokenizer: Any = None, model: Any = None) -> None:
    """Refuse an id that a model can't look up, or that means something else.

    Raises:
        InputError: no id of the embedding, or that of padding, end, start or unknown.
    """
    if id < 0:
        raise InputError(f"mask_token_id must be at least 0, got {id}")
    for kind in _SPECIAL if tokenizer is not None else ():
        if getattr(tokenizer, f"{kind}_token_id", None) == id:
            raise InputError(
                f"mask_token_id {id} is the tokenizer's {kind}_token: masking with it would change what it "
                "means; take a token of its own"
            )
    if model is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        if id >= rows:
            raise InputError(
                f"mask_token_id {id} is beyond the model's embedding of {rows} rows; call "
                f"model.resize_token_embeddings({id + 1}) or resolve_mask_token(..., add_mask_token=True)"
            )


def strip_mask_token(model: Any, tokenizer: Any, mask: MaskToken) -> None:
    """Take away what `resolve_mask_token` added; every other row keeps its bits. Where nothing was added
    nothing is taken away, which is told.

    What was there before is in `mask` and nowhere else: to strip a model that was saved with its token and
    loaded again, pickle `mask` beside it. Resolved again, the token is one that the tokenizer has.

    Args:
        model: The model that the token was added to, or a copy of it.
        tokenizer: Its tokenizer, or None to leave it as it is.
        mask: What `resolve_mask_token` gave when it added the token.

    Raises:
        InputError: tokens were added behind it, or PEFT has wrapped the embedding.
    """
    if not mask.is_added:
        logger.warning(
            "MEAP: `%s` was there when it was resolved, so nothing is taken away; a token that was added "
            "before is taken away with the MaskToken of that time",
            mask.token,
        )
        return
    _check_plain(model, "merge the adapter (merge_and_unload) before strip_mask_token")
    if tokenizer is not None:
        if len(tokenizer) != mask.id + 1:
            raise InputError(
                f"`{mask.token}` has id {mask.id}, but the tokenizer has {len(tokenizer)} tokens by now: "
                "only the last token can be taken away"
            )
        tokenizer.__dict__.clear()
        tokenizer.__dict__.update(mask.tokenizer or {})
    if model.get_input_embeddings().weight.shape[0] != mask.rows:
        with torch.random.fork_rng():
            model.resize_token_embeddings(mask.rows, mean_resizing=False)
    with torch.no_grad():
        for weight, row in zip(_embeddings(model), mask.spare, strict=False):
            weight[mask.id] = row.to(weight)
    _suppress(model, mask.suppressed)


def _added(tokenizer: Any, model: Any) -> MaskToken:
    before, known = copy.deepcopy(tokenizer.__dict__), len(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_special_tokens({"mask_token": ADDED})
    id = tokenizer.mask_token_id
    spare: tuple[Tensor, ...] = ()
    if id < rows:
        spare = tuple(weight[id].detach().clone() for weight in _embeddings(model))
    else:
        with torch.random.fork_rng():  # new rows are drawn first, and a run's seeds are none of our business
            model.resize_token_embeddings(id + 1, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    first = min(id, rows)
    with torch.no_grad():
        for weight in _embeddings(model):
            mean = weight[: min(known, rows)].float().mean(0).to(weight.dtype)
            weight[first : (id + 1 if id < rows else len(weight))] = mean
    _tell_if_frozen(model)
    suppressed = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    _suppress(model, [*(suppressed or ()), id])
    return MaskToken(ADDED, id, rows, spare, before, suppressed)


def _suppress(model: Any, ids: Any) -> None:
    if getattr(model, "generation_config", None) is not None:
        # Another model may have the same object.
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.suppress_tokens = ids


def _check_plain(model: Any, advice: str) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and not isinstance(module, torch.nn.Embedding | torch.nn.Linear):
            raise InputError(
                f"the embedding is a {type(module).__name__} around the model's own, whose rows can't be "
                f"added or taken away: {advice}"
            )


def _embeddings(model: Any) -> list[Tensor]:
    """Weights of the input embedding, and of the output embedding where it is another one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [module.weight for module in modules if module is not None]
    return weights[:1] if len(weights) == 2 and weights[0] is weights[1] else weights


def _tell_if_frozen(model: Any) -> None:
    if not model.get_input_embeddings().weight.requires_grad:
        logger.warning(
            "MEAP: the embedding is frozen, so the new mask token keeps the mean of the others; PEFT trains "
            "it with modules_to_save=['embed_tokens'] or trainable_token_indices, if the token is added "
            "before get_peft_model"
        )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
