"""Which tensors of a checkpoint a parameter is stored in, by headers and config alone.

    as the module calls it       most models
    without the model's prefix   h.0.attn.c_attn.weight: GPT-2 and BLOOM, saved as the hub has them
    with another prefix          language_model.model.layers.0...: Gemma 3 with its vision part
    one tensor for each expert   ...experts.0.w1.weight of Mixtral, stacked in one parameter when loaded

transformers renames and converts what it loads, and knows the way back. It is asked on a model without
memory for its weights, so the answer is there before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.adapter import AdapterCheckpoint
from weightsmith.errors import CheckpointError, require
from weightsmith.evaluation.models import first_line, register_architecture
from weightsmith.tensors.floats import FLOAT_DTYPES

Parts = dict[str, dict[str, Tensor]]
"""By parameter's name: what of it lies in which stored tensor, in that tensor's shape."""


def stored_parts(source: Checkpoint, tensors: Mapping[str, Tensor]) -> Parts:
    """Masks or values of parameters, as `source` stores them.

    Args:
        source: The checkpoint that the model was loaded from.
        tensors: By parameter's name, of the parameter's shape; on the device `meta` to only check them.

    Raises:
        CheckpointError: the weights are quantised; a parameter is stored under no known name, in another
            shape, as no plain floats, or so that it can't be told apart from others.
    """
    if source.quantized:
        raise CheckpointError(f"{source.name}: {source.quantized}; prune the model before it is quantised")
    # A matrix under its own name is stored as it is; stacks may be transposed on the way.
    own = {name for name, tensor in tensors.items() if tensor.ndim == 2 and name in source.tensors}
    loading = _Loading(source) if own != tensors.keys() else None
    found: Parts = {}
    for name, tensor in tensors.items():
        found[name] = {name: tensor} if loading is None or name in own else loading.parts(name, tensor)
        for stored, part in found[name].items():
            _check(source, stored, part)
    return found


class _Loading:
    """What transformers does between a checkpoint's tensors and a model's parameters."""

    def __init__(self, source: Checkpoint) -> None:
        require("transformers", extra="hf", needed_by="pruning")
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._source, self._model = source, _without_weights(source)
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        steps = get_model_conversion_mapping(self._model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._stored: dict[str, list[str]] = {}
        self._converted: set[str] = set()
        for key in source.tensors:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            self._stored.setdefault(name, []).append(key)
            if pattern is not None:
                self._converted.add(name)

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter's tensor as the files have it."""
        keys = self._stored.get(name, [])
        if not keys:
            raise CheckpointError(
                f"{self._source.name}: has no tensor `{name}`; the masks are of a model that stores its "
                "weights under other names. Nothing was written."
            )
        if name not in self._converted:
            return {keys[0]: tensor}
        from transformers.core_model_loading import revert_weight_conversion

        prefix = f"{self._model.base_model_prefix}."
        made = revert_weight_conversion(self._model, {name: tensor})
        found = {key if key in keys else key.removeprefix(prefix): part for key, part in made.items()}
        if found.keys() != set(keys):
            raise CheckpointError(
                f"{self._source.name}: `{name}` is stored in `{keys[0]}` together with other parameters, so "
                "no mask of it alone can be written; leave it out by `ignore`. Nothing was written."
            )
        return found


def _without_weights(source: Checkpoint) -> Any:
    """The model that the checkpoint is loaded as."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = source.plain if isinstance(source, AdapterCheckpoint) else source
    register_architecture(plain.config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain.path))
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(
            f"{source.name}: stores its weights under other names than the masks have, and isn't known as a "
            f"causal language model: {first_line(problem)}. Nothing was written."
        ) from problem


def _check(source: Checkpoint, stored: str, part: Tensor) -> None:
    info = source.tensors[stored]
    if tuple(info.shape) != tuple(part.shape):
        raise CheckpointError(
            f"{source.name}: {stored} is {list(info.shape)}, its mask {list(part.shape)}. Nothing was "
            "written."
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{source.name}: {stored} is {info.dtype}, no plain weights. Nothing was written."
        )
