"""What tensor names say: the layer a tensor belongs to, and which names share one stored tensor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")

_HEADS: tuple[tuple[str, str], ...] = (
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("word_embeddings.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("shared.weight", "lm_head.weight"),
)
"""Stored input embedding -> the output projection that architectures tie to it; special names first."""

_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead", "ForMaskedLM")


_OVER_TOKENS = frozenset(name for pair in _HEADS for name in pair)


def is_over_tokens(name: str) -> bool:
    """Whether tensor `name` is an embedding or output projection, whose first axis counts tokens."""
    return name in _OVER_TOKENS


def layer_index(name: str) -> int | None:
    """The number of the layer that tensor `name` belongs to: its first path part that is an integer.

    Example:
        >>> layer_index("model.layers.12.mlp.experts.3.w1.weight"), layer_index("lm_head.weight")
        (12, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def tied_names(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Names that a loader fills from another stored tensor: alias absent from the files -> stored name.

    transformers writes a tied output projection once, as the input embedding. An absent `lm_head.weight` is
    therefore tied when the architecture has a head and the config does not deny it: families whose default
    is to tie leave `tie_word_embeddings` out of the config.

    Args:
        names: The stored names.
        config: The model's config.json.
    """
    if not _may_tie(config):
        return {}
    tied: dict[str, str] = {}
    for stored, alias in _HEADS:
        if stored in names:
            if alias not in names:
                tied[alias] = stored
            break
    if "shared.weight" in names:
        tied.update({alias: "shared.weight" for alias in _SHARED if alias not in names})
    return tied


def nearest_tensor(pattern: str, names: Iterable[str]) -> str:
    """`"; the nearest is `x`"` for the tensor whose name comes closest to a pattern that matches none.

    Args:
        pattern: A shell pattern or a part of a name.
        names: The tensors' names.

    Example:
        >>> nearest_tensor("*self_atn*", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
        '; the nearest is `model.layers.0.self_attn.q_proj.weight`'
    """
    word = max(re.split(r"[*?\[\]]+", pattern), key=len).strip(".")
    count = word.count(".") + 1
    pieces: dict[str, str] = {}  # run of so many path parts -> the first name that has it
    for name in sorted(names):
        parts = name.split(".")
        for at in range(max(1, len(parts) - count + 1)):
            pieces.setdefault(".".join(parts[at : at + count]), name)
    best = difflib.get_close_matches(word, pieces, n=1, cutoff=0.0)
    return f"; the nearest is `{pieces[best[0]]}`" if best else ""


def _may_tie(config: Mapping[str, Any]) -> bool:
    said = config.get("tie_word_embeddings")
    nested = config.get("text_config")
    if said is None and isinstance(nested, Mapping):
        said = nested.get("tie_word_embeddings")
    if said is not None:
        return bool(said)
    architectures = config.get("architectures") or []
    return not architectures or any(mark in str(architectures[0]) for mark in _HEADED)
