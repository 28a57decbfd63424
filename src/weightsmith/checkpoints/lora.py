"""What a LoRA adapter of PEFT says about the tensors of its base: low-rank changes and replacements.

Change   W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. Weights stored as (in,
         out) (GPT-2's Conv1D) and embeddings take the transpose.
         Embeddings and output that an adapter brings whole may have more rows than the base: added tokens.
Refused  Everything that makes the adapted weight anything else: DoRA, activated LoRA, bias on B, starts
         that also move the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), trainable tokens, other PEFT types.
         A key of the adapter's config that is switched on and not known here is refused too: a new kind is
         not taken for LoRA.

Source  Hu et al., arXiv:2106.09685; peft 0.21 `tuners/lora/layer.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.header import TensorInfo
from weightsmith.checkpoints.names import is_over_tokens
from weightsmith.errors import CheckpointError, nearest
from weightsmith.tensors.floats import FLOAT_DTYPES

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True, slots=True)
class Change:
    """A low-rank change of one stored tensor W.

    Attributes:
        a: Name of A in the adapter's file, (r, in).
        b: Name of B, (out, r).
        rank: r.
        scale: s.
        transposed: W is (in, out).
        columns: Size of a row of W.
        rows: Number of rows of W.
    """

    a: str
    b: str
    rank: int
    scale: float
    transposed: bool
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """All of an adapter.

    Attributes:
        changes: Stored name of the base -> its low-rank change.
        replacements: Stored name of the base -> the adapter's tensors that take its place. More than one
            when an adapter stores a tensor under several names; they must then be equal.
    """

    changes: dict[str, Change]
    replacements: dict[str, list[str]]


def read_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    base_config: Mapping[str, Any],
    where: Path,
) -> Adapter:
    """Match an adapter's tensors with those of its base.

    Args:
        config: adapter_config.json.
        tensors: The tensors of the adapter's file.
        base: The stored tensors of the base.
        tied: The base's tied names.
        base_config: The base's config.json.
        where: The adapter's folder, for messages.

    Raises:
        CheckpointError: the adapter is of a kind that is refused, or it doesn't fit the base.
    """
    check_kind(config, where)
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in tensors:
        short = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(short)
        if match:
            key = (match["module"], match["embedding"] is not None)
            factors.setdefault(key, {})[match["side"] or match["embedding"]] = name
        elif "lora_" in short or "token_adapter" in short:
            raise CheckpointError(
                f"{where}: tensor `{name}` belongs to no plain LoRA; merge it with peft first"
            )
        elif ".original_module." not in short:  # peft's untouched copy beside a saved module
            whole[name] = short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    replacements = _replacements(whole, tensors, base, tied, where)
    changes: dict[str, Change] = {}
    for (module, embedding), pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{where}: module `{module}` has only factor {next(iter(pair))} of A and B")
        stored = _stored(f"{module}.weight", base, tied, where)
        if stored in tied.values() and not config.get("ensure_weight_tying"):
            raise CheckpointError(
                f"{where}: adapts `{module}`, which shares its weight with another module of the base; "
                "untie the base first, or merge the adapter with peft"
            )
        if stored in changes:
            raise CheckpointError(f"{where}: changes `{stored}` of the base twice")
        changes[stored] = _change(
            module,
            embedding,
            tensors[pair["A"]],
            tensors[pair["B"]],
            base[stored],
            config,
            base_config,
            where,
        )
    return Adapter(changes, replacements)


def check_kind(config: Mapping[str, Any], where: Path) -> None:
    """Refuse adapters whose merged weight is not W + s B A.

    Raises:
        CheckpointError: names the key of the config that says so.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r}, expected LORA; merge it with peft first")
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise CheckpointError(
                f"{where}: adapter_config.json has {key} = {str(value)[:60]}, which plain LoRA has not; "
                "merge it with peft first"
            )
    start = config.get("init_lora_weights")
    if start not in _INITS:
        raise CheckpointError(
            f"{where}: init_lora_weights = {start!r} also moves the base; save it as plain LoRA "
            "(peft: `path_initial_model_for_weight_conversion`)"
        )


def _replacements(
    whole: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    where: Path,
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, short in whole.items():
        stored = _stored(short, base, tied, where)
        ours, theirs = tensors[name].shape, base[stored].shape
        # A tuning that added tokens saves its embeddings whole, longer than the base's.
        fits = (
            ours[1:] == theirs[1:] and len(ours) == len(theirs) if is_over_tokens(stored) else ours == theirs
        )
        if not fits:
            raise CheckpointError(f"{where}: `{name}` is {ours}, the base's `{stored}` is {theirs}")
        found.setdefault(stored, []).append(name)
    _check_rows({name: tensors[own[0]] for name, own in found.items()}, base, where)
    return found


def _check_rows(replaced: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], where: Path) -> None:
    """Where an adapter changes the number of tokens, all that counts them must change with it."""
    rows = {
        name: (replaced[name] if name in replaced else base[name]).shape[0]
        for name in base
        if is_over_tokens(name) and base[name].shape
    }
    changed = [name for name in rows if rows[name] != base[name].shape[0]]
    for name, count in rows.items():
        if changed and count != rows[changed[0]]:
            raise CheckpointError(
                f"{where}: leaves `{name}` with {count} rows and gives `{changed[0]}` {rows[changed[0]]}; "
                "embedding and output need as many"
            )


def _stored(name: str, base: Mapping[str, TensorInfo], tied: Mapping[str, str], where: Path) -> str:
    """The stored name of the base that a module's parameter `name` has.

    Files of some families lack the model's own prefix (the hub's GPT-2 has `h.0...` for
    `transformer.h.0...`), so the one name that differs by leading parts only is taken as well.
    """
    if name in base:
        return name
    if name in tied:
        return tied[name]
    close = [other for other in base if other.endswith("." + name) or name.endswith("." + other)]
    if len(close) != 1:
        found = f"{len(close)} names end like it" if close else f"not there{nearest(name, base)}"
        raise CheckpointError(f"{where}: adapts `{name}`, which the base has not: {found}")
    return close[0]


def _change(
    module: str,
    embedding: bool,
    a: TensorInfo,
    b: TensorInfo,
    weight: TensorInfo,
    config: Mapping[str, Any],
    base_config: Mapping[str, Any],
    where: Path,
) -> Change:
    rank = int(_pattern(config, "rank_pattern", module, config.get("r"), where))
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"), where)
    shapes = f"A {a.shape}, B {b.shape} on `{weight.name}` {weight.shape}"
    if len(a.shape) != 2 or len(b.shape) != 2 or len(weight.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(f"{where}: {shapes}: expected matrices with one rank between them")
    if a.shape[0] != rank:
        raise CheckpointError(f"{where}: {shapes}: rank {a.shape[0]}, adapter_config.json says {rank}")
    if weight.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{where}: adapts `{weight.name}`, which the base stores as {weight.dtype}")
    straight = (b.shape[0], a.shape[1])
    transposed = embedding or straight != weight.shape
    if (
        straight == weight.shape == straight[::-1] and not embedding
    ):  # a square matrix doesn't show its layout
        transposed = _is_conv1d(module, config, base_config)
    if (straight[::-1] if transposed else straight) != weight.shape:
        raise CheckpointError(f"{where}: {shapes}: the product does not fit")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Change(a.name, b.name, rank, scale, transposed, *weight.shape)


def _is_conv1d(module: str, config: Mapping[str, Any], base_config: Mapping[str, Any]) -> bool:
    """The value peft saves is that of the last layer it visited, so the model family knows better."""
    if base_config.get("model_type") in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_MODULES
    return bool(config.get("fan_in_fan_out"))


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any, where: Path) -> float:
    """The value of `module` in a `rank_pattern` or `alpha_pattern`, matched as peft matches it."""
    value = default
    for pattern, own in (config.get(key) or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as problem:
            raise CheckpointError(
                f"{where}: {key}: `{pattern}` is no regular expression: {problem}"
            ) from problem
        if matched:
            value = own
            break
    if not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(
            f"{where}: {key} or its default for `{module}` is {value!r}, expected a number > 0"
        )
    return value
