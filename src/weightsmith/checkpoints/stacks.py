"""Stacks of layers put together anew: which tensors a layer has, what stands before and after the layers, and
what the config must then say.

Letters  L layers of the output
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from weightsmith.checkpoints.reader import Checkpoint
from weightsmith.errors import CheckpointError

_LAYERED = re.compile(r"^(.*?\.|)(\d+)(\..+)$")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Where the config counts the layers of a part of the model: sections ("" is the page itself) and keys.
_PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vision_tower": (("vision_config",), (*_LAYER_COUNTS, "depth")),
    "vision_model": (("vision_config",), (*_LAYER_COUNTS, "depth")),
    "encoder": (("",), ("num_layers", "num_hidden_layers", "encoder_layers")),
    "decoder": (("",), ("num_decoder_layers", "decoder_layers")),
}
# Lists of layer numbers; other lists that are as long as the model is deep hold one value a layer.
_LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers", "dense_layers")
# Rules by layer number: a restacked model follows them by its new numbers.
_PATTERNS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "interleave_moe_layer_step",
    "attn_layer_period",
    "expert_layer_period",
    "max_window_layers",
)
# `project_in` follows the embedding of OPT, `w` is that of CTRL.
_FIRST = re.compile(r"(^|\.)(wte|wpe|emb|tok|.*embed.*|word_embeddings.*|shared|project_in|transformer\.w)\.")
_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder")
# The output of GPT-NeoX and the last norm of LFM2, whatever they are called.
_LAST = re.compile(r"(^|\.)(embed_out|embedding_norm)\.")

WHOLE = "default"
"""The part of a model that is the model itself."""


class Stack:
    """A stack of layers of one model.

    Args:
        model: The model.
        names: Its tensors that the stack is looked for in: all, or those of one part of the model.

    Attributes:
        prefix: What stands before the layer's number in names (`model.layers.`).
        depth: Number of layers.
        rest: Rests of the names in each layer (`.mlp.up_proj.weight`), by layer.
    """

    def __init__(self, model: Checkpoint, names: Collection[str]) -> None:
        self.rest: dict[int, list[str]] = {}
        prefixes = set()
        for name in names:
            match = _LAYERED.match(name)
            if match:
                prefixes.add(match[1])
                self.rest.setdefault(int(match[2]), []).append(match[3])
        if len(prefixes) != 1:
            found = ", ".join(sorted(prefixes)) or "none"
            raise CheckpointError(f"{model.name}: slices need one stack of layers, found {found}")
        self.prefix = prefixes.pop()
        self.depth = len(self.rest)
        if sorted(self.rest) != list(range(self.depth)):
            raise CheckpointError(
                f"{model.name}: layers {self.prefix}* are not numbered 0 .. {self.depth - 1} without a gap"
            )

    def name(self, layer: int, rest: str) -> str:
        """The tensor's name in this model."""
        return f"{self.prefix}{layer}{rest}"

    def outside(self, names: Collection[str]) -> list[str]:
        """Names outside the layers."""
        return [name for name in names if not (match := _LAYERED.match(name)) or match[1] != self.prefix]


def decoder_stack(model: Checkpoint) -> Stack:
    """The stack of a decoder's layers; the tower of images or sound beside it may have one of its own.

    Raises:
        CheckpointError: as `Stack`.
    """
    return Stack(model, _decoder_layers(model.tensors) or model.tensors)


def text_layers(names: Collection[str]) -> list[str]:
    """Of tensors or modules of a model that reads more than text, those in the layers of its text decoder; of
    any other model all.

    Example:
        >>> text_layers(["vision_tower.encoder.layers.0.fc1", "projector.fc", "model.layers.0.mlp.up_proj"])
        ['model.layers.0.mlp.up_proj']
    """
    inner, layered = _decoder_layers(names), [name for name in names if _LAYERED.match(name)]
    return inner if 0 < len(inner) < len(layered) else list(names)


def _decoder_layers(names: Collection[str]) -> list[str]:
    """Names within numbered layers, but for those of towers. What stands before the number tells: a decoder's
    own layers may attend to an encoder.
    """
    return [name for name in names if (match := _LAYERED.match(name)) and not _TOWER.search(match[1])]


def is_first(name: str) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings) and so follows the first slice."""
    return bool(_FIRST.search(name)) and not _LAST.search(name)


def restacked(
    config: Mapping[str, Any], kept: Sequence[int], depth: int, module: str = WHOLE
) -> tuple[dict[str, Any], list[str]]:
    """The config of a model whose layers are the `kept` ones of a model of `depth`, in this order.

    Args:
        config: config.json of the model the layers are counted in.
        kept: For each of the L output layers its number in that model.
        depth: Layers of that model.
        module: The part of the model whose layers they are.

    Returns:
        The new config, and the keys in it that rule layers by their number and now mean other ones.

    Example:
        >>> restacked({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, [0, 2, 2], 3)
        ({'num_hidden_layers': 3, 'layer_types': ['a', 'c', 'c']}, [])
    """
    new = copy.deepcopy(dict(config))
    doubtful = []
    cycled = module == WHOLE and new.get("num_physical_layers") == depth
    if cycled:
        _count_places(new, len(kept))
    sections, counts = _PLACES.get(module, (("", "text_config"), _LAYER_COUNTS))
    for part in (new.get(section) if section else new for section in sections):
        if not isinstance(part, dict):
            continue
        for key in counts:
            if part.get(key) == depth and not cycled:
                part[key] = len(kept)
        for key, value in part.items():
            if key in _LAYER_NUMBERS and isinstance(value, list):
                part[key] = [place for place, layer in enumerate(kept) if layer in value]
            elif isinstance(value, list) and len(value) == depth and ("layer" in key or "block" in key):
                part[key] = [value[layer] for layer in kept]
            elif key in _PATTERNS and value and "layer_types" not in part:
                doubtful.append(key)
    return new, doubtful


def _count_places(config: dict[str, Any], layers: int) -> None:
    """A model with cycles counts its layers in `num_physical_layers`, the places of its cache in
    `num_hidden_layers`, and lists kinds of both.
    """
    outside = config["num_head_layers"] + config["num_tail_layers"]
    cycles = (config["num_hidden_layers"] - outside) // (config["num_physical_layers"] - outside)
    config["num_hidden_layers"] = outside + cycles * (layers - outside)
    config["num_physical_layers"] = layers
    config.pop("layer_types", None)  # made anew from `physical_layer_types` by whoever loads it
