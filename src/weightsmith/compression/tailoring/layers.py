"""The stack of layers inside a model of any architecture, and a config that fits other layers.

A decoder's layers are the `ModuleList` that is as long as its config says it is deep. What a config says
layer by
layer follows the layers that are kept: lists with one value a layer (`layer_types`), lists of layer numbers
(`mlp_only_layers`), and rules by number, which are written out as lists where there is an exact one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.stacks import restacked
from weightsmith.errors import InputError

if TYPE_CHECKING:
    from torch import nn

# Ties a layer's arithmetic to its number, or layers to one another: no layer can be taken out.
_BOUND = (
    "scale_attn_by_inverse_layer_idx",
    "num_kv_shared_layers",
    "num_physical_layers",
    "hidden_size_per_layer_input",
)
_WRITTEN_OUT = ("decoder_sparse_step", "first_k_dense_replace", "interleave_moe_layer_step")


def text_config(config: Any) -> Any:
    """The config object that counts the layers of the text decoder."""
    return config.get_text_config(decoder=True)


def stack_path(model: nn.Module) -> str:
    """The name of the module list that holds a decoder's layers, such as `model.layers`.

    Raises:
        InputError: there is none.
    """
    from torch import nn

    depth = text_config(model.config).num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise InputError(f"{type(model).__name__}: has no list of {depth} layers (a ModuleList) to tailor")
    # The lists of a vision tower that is as deep stand below modules of their own.
    return min(found, key=lambda name: ("vision" in name or "encoder" in name, name.count("."), name))


def kept_config(config: Mapping[str, Any], kept: Sequence[int], depth: int) -> dict[str, Any]:
    """The content of a config for a model with the `kept` layers of one of `depth`.

    Args:
        config: What `PreTrainedConfig.to_dict` gives: lists by layer are then complete.
        kept: Numbers of layers, ascending.
        depth: Layers of that model.

    Raises:
        InputError: a rule ties layers to their numbers.

    Example:
        >>> kept_config({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, [0, 2], 3)
        {'num_hidden_layers': 2, 'layer_types': ['a', 'c']}
    """
    new = copy.deepcopy(dict(config))
    for part in (new, new.get("text_config")):
        if isinstance(part, dict):
            _write_out(part, kept, depth)
    new, doubtful = restacked(new, kept, depth)
    # Written out above, or by the list of types.
    doubtful = [key for key in doubtful if key not in _WRITTEN_OUT]
    if doubtful and len(kept) < depth:
        raise InputError(
            f"config: {doubtful[0]} rules layers by their numbers, which change where layers are dropped"
        )
    return new


def fitted_config(config: Any, kept: Sequence[int]) -> Any:
    """A config object for the `kept` layers. Raises as `kept_config`."""
    depth = text_config(config).num_hidden_layers
    old, values = config.to_dict(), kept_config(config.to_dict(), kept, depth)
    new = copy.deepcopy(config)
    _set_changed(new, old, values)
    inner = text_config(new)
    if inner is not new:
        _set_changed(inner, old.get("text_config", {}), values.get("text_config", {}))
    return new


def _set_changed(config: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if key != "text_config" and old.get(key) != value:
            setattr(config, key, value)


def _write_out(config: dict[str, Any], kept: Sequence[int], depth: int) -> None:
    """Put lists in the place of rules by number, in the numbers of the base."""
    for key in _BOUND:
        if config.get(key):
            raise InputError(f"config: {key} = {config[key]} ties layers to their numbers or to one another")
    if (config.get("decoder_sparse_step") or 1) != 1 and len(kept) < depth:
        dense = [layer for layer in range(depth) if (layer + 1) % config["decoder_sparse_step"]]
        config["mlp_only_layers"] = sorted({*(config.get("mlp_only_layers") or ()), *dense})
        config["decoder_sparse_step"] = 1
    if first := config.get("first_k_dense_replace"):
        # Layers keep their order, so the dense ones stay in front.
        config["first_k_dense_replace"] = sum(layer < first for layer in kept)
    for key in ("attn_layer_period", "expert_layer_period", "interleave_moe_layer_step"):
        listed = key.startswith("interleave") and config.get("moe_layers") is not None
        if (config.get(key) or 1) != 1 and len(kept) < depth and not listed:
            raise InputError(
                f"config: {key} = {config[key]} rules layers by their numbers, which change where layers are "
                "dropped"
            )
