"""Whether checkpoints may be merged: everything their headers, configs and tokenizers can tell.

Nothing is skipped over: a tensor with another shape, or one that only some models have, is an error that
names it. The exceptions are buffers that loaders make themselves, and a second copy of a tied tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.header import TensorInfo
from weightsmith.errors import CheckpointError
from weightsmith.tensors.floats import FLOAT_DTYPES

NOTHING_WRITTEN = "Nothing was written."
# Made by the model's code; old checkpoints store them.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias", ".position_ids")
# Read by the model's code at every step: weights tuned under one value don't fit another.
_BEHAVIOUR = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "hidden_activation",
    "sliding_window",
    "layer_types",
    "num_experts_per_tok",
)
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse quantised and packed weights.

    Raises:
        CheckpointError: why its weights are not plain numbers.
    """
    if checkpoint.quantized:
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.quantized}; expected plain float weights. Merge the models it "
            f"was made from, or dequantise it first. {NOTHING_WRITTEN}"
        )


def check_architecture(model: Checkpoint, reference: Checkpoint) -> list[str]:
    """Refuse another kind of model; returns warnings about settings that differ.

    Raises:
        CheckpointError: the model types differ.
    """
    ours, theirs = reference.config.get("model_type"), model.config.get("model_type")
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{model.name}: is a `{theirs}`, {reference.name} is a `{ours}`; only models of one architecture "
            f"can be merged. {NOTHING_WRITTEN}"
        )
    inner, outer = text_config(model.config), text_config(reference.config)
    different = [
        f"{key} ({inner[key]} against {outer[key]})"
        for key in _BEHAVIOUR
        if key in inner and key in outer and inner[key] != outer[key]
    ]
    if not different:
        return []
    return [f"{model.name} and {reference.name} differ in {', '.join(different)}; the output has the latter"]


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that loaders make themselves."""
    return name.endswith(_BUFFERS)


def find(model: Checkpoint, name: str) -> TensorInfo | None:
    """The stored tensor a model uses under this name, its own or the one it is tied to."""
    return model.tensors.get(model.tied.get(name, name))


def check_names(
    model: Checkpoint, reference: Checkpoint, of_model: Collection[str], of_reference: Collection[str]
) -> None:
    """Refuse models that don't hold the same tensors.

    Args:
        model: One model.
        reference: The other.
        of_model: Its names that matter: all, or those of one part of the model.
        of_reference: The same of the reference.

    Raises:
        CheckpointError: a tensor that only one of the two has.
    """
    for name in of_reference:
        if not is_buffer(name) and find(model, name) is None:
            raise CheckpointError(
                f"{model.name}: has no tensor `{name}`, {reference.name} has "
                f"{list(reference.tensors[name].shape)}. {NOTHING_WRITTEN}"
            )
    for name in of_model:
        if is_buffer(name) or name in reference.tensors or _is_redundant(model, name, reference):
            continue
        if name in reference.tied:
            raise CheckpointError(
                f"{model.name}: stores its own `{name}`, in {reference.name} it is tied to "
                f"`{reference.tied[name]}`. {NOTHING_WRITTEN}"
            )
        raise CheckpointError(
            f"{model.name}: has a tensor `{name}` that {reference.name} lacks. {NOTHING_WRITTEN}"
        )


def check_shapes(
    name: str, found: Sequence[tuple[Checkpoint, TensorInfo]], reference: tuple[Checkpoint, TensorInfo]
) -> None:
    """Refuse a tensor whose shape or kind of number differs between models.

    Raises:
        CheckpointError: names the tensor, both shapes (or dtypes) and both models.
    """
    owner, wanted = reference
    for model, info in found:
        if info.shape != wanted.shape:
            raise CheckpointError(
                f"{model.name}: {name} is {list(info.shape)}, {owner.name} has {list(wanted.shape)}"
                f"{_vocabulary_hint(info.shape, wanted.shape)}. {NOTHING_WRITTEN}"
            )
        plain = info.dtype in FLOAT_DTYPES
        if plain != (wanted.dtype in FLOAT_DTYPES) or (not plain and info.dtype != wanted.dtype):
            raise CheckpointError(
                f"{model.name}: {name} is {info.dtype}, {owner.name} has {wanted.dtype}. {NOTHING_WRITTEN}"
            )


def check_equal_bytes(name: str, found: Sequence[tuple[Checkpoint, TensorInfo]]) -> None:
    """Refuse an integer tensor that differs between models: there is no mean of indices.

    Raises:
        CheckpointError: names the tensor and the two models.
    """
    owner, info = found[0]
    for model, other in found[1:]:
        if not (owner.read_raw(info.name) == model.read_raw(other.name)).all():
            raise CheckpointError(
                f"{model.name}: {name} ({info.dtype}) differs from that of {owner.name}; integer tensors are "
                f"copied and must be equal. {NOTHING_WRITTEN}"
            )


def check_tokenizers(models: Sequence[Checkpoint], reference: Checkpoint, cure: str) -> None:
    """Refuse models whose tokens have other numbers: their embeddings would be mixed up silently.

    Args:
        models: The others.
        reference: Whose tokenizer the output takes.
        cure: What a user may write on the page to merge all the same.

    Raises:
        CheckpointError: names the two models and the first token that differs.
    """
    ours = vocabulary_bytes(reference)
    for model in models:
        theirs = vocabulary_bytes(model)
        if not ours or not theirs or ours == theirs:
            continue
        difference = _difference(ours, theirs)
        if difference:
            raise CheckpointError(
                f"{model.name}: its tokenizer differs from that of {reference.name}: {difference}. Set "
                f"`{cure}: base` to take {reference.name}'s for all, or `{cure}: union`. {NOTHING_WRITTEN}"
            )


def _is_redundant(model: Checkpoint, name: str, reference: Checkpoint) -> bool:
    """A stored copy of what this model's config ties: loaders ignore it."""
    return name in reference.tied and bool(text_config(model.config).get("tie_word_embeddings"))


def _vocabulary_hint(one: Sequence[int], other: Sequence[int]) -> str:
    same_width = len(one) == len(other) == 2 and one[1] == other[1]
    return "; if these are token embeddings, the vocabularies differ" if same_width else ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with what it says of its text model on top."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint comes with its vocabulary."""
    return bool({"tokenizer.json", *_VOCABULARIES} & set(checkpoint.side_file_map()))


def vocabulary_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that hold a checkpoint's vocabulary; empty where it has none."""
    files = checkpoint.side_file_map()
    names = ["tokenizer.json"] if "tokenizer.json" in files else [n for n in _VOCABULARIES if n in files]
    return {name: files[name].read_bytes() for name in names}


def _difference(ours: dict[str, bytes], theirs: dict[str, bytes]) -> str:
    """What differs in words; empty where only the spelling of the files does."""
    if set(ours) != set(theirs):
        return f"one has {', '.join(sorted(ours))}, the other {', '.join(sorted(theirs))}"
    if "tokenizer.json" not in ours:
        return f"{', '.join(name for name in ours if ours[name] != theirs[name])} differs"
    one, other = _tokens(ours["tokenizer.json"]), _tokens(theirs["tokenizer.json"])
    if one == other:
        return ""
    different = sorted(
        (token for token in {*one, *other} if one.get(token) != other.get(token)),
        key=lambda token: (min(ids.get(token, 1 << 60) for ids in (one, other)), token),
    )
    token = different[0]
    return f"token {token!r} is {other.get(token, 'absent')} and not {one.get(token, 'absent')}"


def _tokens(tokenizer: bytes) -> dict[str, int]:
    """Token -> number out of a tokenizer.json."""
    page = json.loads(tokenizer)
    vocabulary = page.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score] in order of numbers
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **{entry["content"]: entry["id"] for entry in page.get("added_tokens") or []}}
