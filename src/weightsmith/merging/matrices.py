"""Which parameters are matrices to a spectral method, and which matrices a stored tensor holds.

A linear layer is one matrix, a stack of experts one for each expert, a convolution kernel one of shape
(out, rest). Layers that were fused for speed (query, key and value in one, gate and up in one) hold two or
three matrices whose spectra have nothing to do with each other, so that one SVD over all of them would mix
their ranks; `matrix_indices` takes them apart by the layout of their architecture. A layout that is not known
is an error, never a guess.

Letters  E experts, M rows, N columns, H attention heads, D head size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np

from weightsmith.errors import InputError

EMBEDDINGS = ("*embed*", "*lm_head*", "*wte.*", "*wpe.*", "output.weight")
"""Names of embeddings and output heads: tables of tokens, whose rows are not a linear map's."""

Index = slice | np.ndarray

_PER_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder")


def is_matrix(name: str, shape: Sequence[int], exclude: Sequence[str]) -> bool:
    """Whether a spectral method sees matrices in this tensor; `exclude` are shell patterns on its name."""
    if (
        len(shape) < 2 or 0 in shape or name.endswith("bias")
    ):  # biases of stacked experts are rows of a matrix
        return False
    return not any(fnmatchcase(name, pattern) for pattern in exclude)


def stack_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a matrix (M, N) or stack of matrices (E, M, N)."""
    if len(shape) > 3 or (len(shape) == 3 and "conv" in name):
        return shape[0], int(np.prod(shape[1:]))
    return tuple(shape)


def matrix_indices(
    name: str, shape: Sequence[int], config: Mapping[str, Any], split_fused: bool
) -> Iterator[tuple[int | Index, ...]]:
    """Indices that pick one matrix each out of an array of `stack_shape`; together every element once.

    Raises:
        InputError: a fused layer whose layout `config` does not tell, or does not fit.
    """
    stacked = stack_shape(name, shape)
    axis, parts = (0, (slice(None),))
    if split_fused:
        axis, parts = _fused(name, stacked, config)
    experts = range(stacked[0]) if len(stacked) == 3 else (None,)
    for expert, part in product(experts, parts):
        picked = (part, slice(None)) if axis == 0 else (slice(None), part)
        yield picked if expert is None else (expert, *picked)


def inputs_first(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Whether a linear layer is stored (inputs, outputs), as GPT-2's and some stacks of experts are."""
    config = config.get("text_config") or config
    kind = config.get("model_type", "")
    if len(shape) == 3:
        return kind in (*_TRANSPOSED, "gpt_oss")
    return kind in _CONV1D and any(word in _CONV1D_LAYERS for word in name.split("."))


def smallest_side(name: str, shape: Sequence[int], config: Mapping[str, Any], split_fused: bool) -> int:
    """The least min(M, N) of the matrices in a parameter.

    Raises:
        InputError: as `matrix_indices`.
    """
    sides = stack_shape(name, shape)[-2:]
    return min(
        len(part) if isinstance(part, np.ndarray) else len(range(*part.indices(side)))
        for index in matrix_indices(name, shape, config, split_fused)
        for part, side in zip(index[-2:], sides, strict=True)
        if not isinstance(part, int)
    )


def crowded(pairs: Iterable[tuple[Any, Any]]) -> tuple[str, ...]:
    """A warning where a spectral method has more models than a matrix has directions.

    Args:
        pairs: Each parameter with the method's instance for it.

    Raises:
        InputError: as `matrix_indices`.
    """
    tight = [
        (parameter, room)
        for parameter, method in pairs
        if hasattr(method, "room") and method.takes(parameter)
        if (room := method.room(parameter)) < parameter.num_models
    ]
    if not tight:
        return ()
    first, room = tight[0]
    number = "1 tensor has" if len(tight) == 1 else f"{len(tight)} tensors have"
    return (
        f"{number} fewer directions than the {first.num_models} models to merge ({first.name}: {room}); "
        "there only the largest changes count",
    )


def _fused(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, tuple[Index, ...]]:
    """Axis of the matrix (0 rows, 1 columns) and the parts along it; one part where nothing is fused."""
    words = name.split(".")
    config = config.get("text_config") or config
    for word, layout in _LAYOUTS.items():
        if word in words:
            try:
                return layout(shape, config)
            except KeyError as missing:
                problem = f"its config has no {missing}"
            except _Unknown as unknown:
                problem = str(unknown)
            raise InputError(
                f"{name}: can't tell the parts of this fused layer {tuple(shape)}: {problem}. "
                "Set `split_fused: false` to treat it as one matrix, or add its name to `exclude`."
            )
    return 0, (slice(None),)


class _Unknown(Exception):
    """A layout that can't be told."""


def _qkv_proj(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, tuple[Index, ...]]:
    kind = config.get("model_type", "")
    heads, head, groups = _heads(config)
    if kind == "codegen":  # four groups of heads, each query, value, key
        query, value, key = _strided(shape[0], (4, 3, heads * head // 4))
        return 0, (query, key, value)
    if kind == "minimax":  # each head query, key, value
        return 0, _strided(shape[0], (heads, 3, head))
    return 0, _blocks(shape[0], heads * head, groups * head, groups * head)


def _query_key_value(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, tuple[Index, ...]]:
    kind = config.get("model_type", "")
    heads, head, groups = _heads(config)
    if kind in _PER_HEAD or (
        kind == "falcon" and not _grouped(config) and not config.get("multi_query", True)
    ):
        return 0, _strided(shape[0], (heads, 3, head))
    if kind == "falcon" and _grouped(config):  # each group its queries, one key, one value
        rows = _rows(shape[0], (groups, heads // groups + 2, head))
        return 0, (rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel())
    if kind == "falcon":
        return 0, _blocks(shape[0], heads * head, head, head)
    raise _Unknown(f"query_key_value of the architecture `{kind}` is not known here")


def _c_attn(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, tuple[Index, ...]]:
    kind = config.get("model_type", "")
    if kind in _CONV1D:  # stored (in, out)
        return 1, _blocks(shape[1], *[shape[0]] * 3)
    heads, head, _ = _heads(config)
    if kind == "gpt_bigcode" and config.get("multi_query", True):
        return 0, _blocks(shape[0], heads * head, head, head)
    if kind == "gpt_bigcode":
        return 0, _strided(shape[0], (heads, 3, head))
    if kind == "qwen":
        return 0, _blocks(shape[0], *[heads * head] * 3)
    raise _Unknown(f"c_attn of the architecture `{kind}` is not known here")


def _gate_up_proj(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, tuple[Index, ...]]:
    hidden, kind = config["hidden_size"], config.get("model_type", "")
    rows, columns = shape[-2:]
    if len(shape) == 3 and kind == "gpt_oss":  # (E, hidden, 2 x inner), gate and up take turns
        return 1, (slice(0, None, 2), slice(1, None, 2))
    if columns == hidden and rows % 2 == 0 and not (rows == hidden and kind in _TRANSPOSED):
        return 0, _blocks(rows, rows // 2, rows // 2)
    if len(shape) == 3 and rows == hidden and kind in _TRANSPOSED:
        return 1, _blocks(columns, columns // 2, columns // 2)
    raise _Unknown(f"neither side holds gate and up for hidden_size {hidden} in the architecture `{kind}`")


# Stacks whose experts are stored (hidden, 2 x inner), halves next to each other.
_TRANSPOSED = ("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
_LAYOUTS = {
    "qkv_proj": _qkv_proj,
    "query_key_value": _query_key_value,
    "c_attn": _c_attn,
    "gate_up_proj": _gate_up_proj,
}


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Attention heads, head size, groups of keys and values, under any of the names in use."""
    hidden = _first(config, "hidden_size", "n_embd")
    heads = _first(config, "num_attention_heads", "n_head")
    head = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or config.get("num_kv_heads")
    return heads, head, groups or heads


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name):
            return config[name]
    raise KeyError(names[0])


def _grouped(config: Mapping[str, Any]) -> bool:
    return bool(config.get("new_decoder_architecture", False))


def _blocks(size: int, *sizes: int) -> tuple[slice, ...]:
    """Consecutive blocks of these sizes."""
    if sum(sizes) != size:
        raise _Unknown(f"its heads and sizes in the config make {' + '.join(map(str, sizes))}, not {size}")
    ends = np.cumsum(sizes).tolist()
    return tuple(slice(end - part, end) for part, end in zip(sizes, ends, strict=True))


def _strided(size: int, form: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """The parts along the middle axis when `size` is laid out as `form`."""
    rows = _rows(size, form)
    return tuple(rows[:, part].ravel() for part in range(form[1]))


def _rows(size: int, form: tuple[int, int, int]) -> np.ndarray:
    if int(np.prod(form)) != size:
        raise _Unknown(f"its heads and sizes in the config make {' x '.join(map(str, form))}, not {size}")
    return np.arange(size).reshape(form)
