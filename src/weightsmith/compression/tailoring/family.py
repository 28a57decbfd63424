"""Whether models are one family: the same tensors of the same shapes, plain numbers, not far apart."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weightsmith.compression.tailoring.layers import text_config
from weightsmith.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_ACTIVATION = re.compile(r"(^|_)act(ivation)?(_|$)")
# Of training, of generation, of where a model comes from: no layer computes anything else for them.
_NO_MATTER = re.compile(
    r"^_|drop|^initializer_|^init_|_token_id$|^(output|summary)_|^(max|n)_position|(aux|z)_loss|jitter_noise"
    r"|^(architectures|auto_map|torch_dtype|dtype|transformers_version|use_cache|pretraining_tp|id2label|label2id"
    r"|num_labels|problem_type|return_dict|chunk_size_feed_forward|tokenizer_class|name_or_path)$"
)
_SAMPLED_LAYERS = 3
_LONGEST = 60
"""Characters of a value in a message."""


def check_tensors(
    names: Sequence[str],
    path: str,
    layers: Sequence[Sequence[nn.Module]],
    edges: Sequence[Mapping[str, Tensor]],
) -> None:
    """Refuse models whose layers hold other tensors, shapes or types.

    Args:
        names: Of the models, the base first.
        path: Of the list of layers.
        layers: Of each model.
        edges: Of each model, its parameters outside of the layers.

    Raises:
        InputError: names the model and the tensor.
    """
    depth = len(layers[0])
    for number in range(1, len(layers)):
        if len(layers[number]) != depth:
            raise InputError(f"{names[number]}: has {len(layers[number])} layers, {names[0]} has {depth}")
        for layer in range(depth):
            ours, theirs = (layers[who][layer].state_dict() for who in (0, number))
            _compare(names, number, f"{path}.{layer}.", ours, theirs)
        _compare(names, number, "", edges[0], edges[number])


def _compare(
    names: Sequence[str], number: int, prefix: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> None:
    base, model = names[0], names[number]
    for name in ours:
        if name not in theirs:
            raise InputError(f"{model}: has no tensor `{prefix}{name}`, {base} has {list(ours[name].shape)}")
    for name, value in theirs.items():
        if name not in ours:
            raise InputError(f"{model}: has a tensor `{prefix}{name}` that {base} lacks")
        if value.shape != ours[name].shape:
            raise InputError(
                f"{model}: `{prefix}{name}` is {list(value.shape)}, {base} has {list(ours[name].shape)}"
            )
        if value.dtype != ours[name].dtype or value.device != ours[name].device:
            raise InputError(
                f"{model}: `{prefix}{name}` is {value.dtype} on {value.device}, {base} has "
                f"{ours[name].dtype} on {ours[name].device}: load all models alike"
            )


def warn_of_strangers(names: Sequence[str], layers: Sequence[Sequence[nn.Module]]) -> None:
    """Say so where a candidate is no fine-tune of the base: sampled in a few layers."""
    depth = len(layers[0])
    places = sorted({round(k * (depth - 1) / (_SAMPLED_LAYERS - 1)) for k in range(_SAMPLED_LAYERS)})
    for number in range(1, len(layers)):
        ratios = []
        for place in places:
            other = dict(layers[number][place].named_parameters())
            for name, value in layers[0][place].named_parameters():
                size = value.detach().float().norm()
                if size > 0:  # biases that are 0 have no ratio
                    ratios.append(
                        float((other[name].detach().float() - value.detach().float()).norm() / size)
                    )
        if ratios and sorted(ratios)[len(ratios) // 2] > 1:
            log.warning(
                "%s: deltas larger than the base: are these fine-tunes of %s?",
                names[number],
                names[0],
            )


def check_plain(name: str, model: Any) -> None:
    """Refuse weights that are quantised or sharded.

    Raises:
        CheckpointError: they are quantised; says how.
        InputError: they are sharded.
    """
    if getattr(model.config, "quantization_config", None) is not None or getattr(
        model, "is_quantized", False
    ):
        raise CheckpointError(
            f"{name}: is quantised; blends of packed weights have no meaning: give plain floats"
        )
    from torch.distributed.tensor import DTensor

    for key, value in model.named_parameters():
        if isinstance(value, DTensor):
            raise InputError(f"{name}: `{key}` is sharded (DTensor); gather the model before it is tailored")
        if not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(f"{name}: `{key}` is {value.dtype}, expected plain float weights")


def check_fields(name: str, config: Any, base_name: str, base_config: Any) -> None:
    """Refuse a model of another shape, or of another activation: its weights mean nothing behind the base's.

    Args:
        name: What to call the model.
        config: Its config object.
        base_name: What to call the base.
        base_config: The base's config object.

    Raises:
        InputError: names the field and both values.
    """
    ours, theirs = text_config(base_config), text_config(config)
    activations = [field for field in _plain(ours) if _ACTIVATION.search(field) and "drop" not in field]
    for field in (*_FIELDS, *activations):
        wanted, found = getattr(ours, field, None), getattr(theirs, field, None)
        if wanted != found:
            raise InputError(
                f"{name}: {field} = {found}, {base_name} has {wanted}; expected fine-tunes of one base"
            )


def warn_of_fields(name: str, config: Any, base_name: str, base_config: Any) -> None:
    """Say so where a config has another value of what rules the arithmetic of layers: rotary positions, the
    epsilon of norms, attention windows, experts per token. In a tailored model all layers run by the base's.
    Arguments as of `check_fields`.
    """
    ours, theirs = (_plain(text_config(one)) for one in (base_config, config))
    differing = [
        f"{field} = {_short(theirs[field])} ({base_name} has {_short(wanted)})"
        for field, wanted in ours.items()
        if field in theirs and theirs[field] != wanted and not _NO_MATTER.search(field)
    ]
    if differing:
        log.warning(
            "%s: %s; its layers would run with the values of %s", name, ", ".join(differing), base_name
        )


def _plain(config: Any) -> dict[str, Any]:
    """The fields of a config, those of its sections by dotted names."""
    return dict(_flat("", config.to_dict()))


def _flat(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
