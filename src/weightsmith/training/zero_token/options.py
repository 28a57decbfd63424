"""What a Zero-Token Transformer is made of, from plain configs: without torch, for pages and dry runs.

Layers of the base are split in head, middle and tail; the middle runs `num_cycles` times. A config of ours
says how many layers there are in files (`num_physical_layers`) and, as `num_hidden_layers`, how many places
the cache of a pass needs: transformers makes caches from that number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from weightsmith.errors import InputError, nearest

MODEL_TYPE = "ztt"
BASES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers compute what ours do."""

SCOPES = ("layer_cycle", "layer", "cycle")
KEY_SPACES = ("head", "hidden")
QUERIES = ("post_rope", "pre_rope")
GATES = ("layer", "attn", "none")
CYCLE_GATES = ("off", "zero_init")
LEVELS = ("batch", "sequence", "token")
READ_CRITERIA = ("entropy", "kl")
"""Criteria that read predictions."""
CRITERIA = ("zero_attention", "latent_diff", *READ_CRITERIA)
KV_POLICIES = ("propagate", "copy", "share", "none")
SCHEDULES = ("all", "grow", "sample")
IMPLEMENTATIONS = ("auto", "lse", "concat")
KEYS = "model.zero_token.bias_k"
SCORES = "model.zero_token.bias_z"
CYCLES = "model.cycle_gate.bias"
EXTRA_MODULES = ("model.zero_token", "model.cycle_gate")
"""What a base doesn't have, as far as a model has it: trained as a whole where an adapter is trained."""
KEY_STD = 0.02
WITHOUT_ZERO_TOKENS: Mapping[str, Any] = {
    "zero_token_scope": "layer_cycle",
    "zero_key_space": "head",
    "zero_query": "post_rope",
    "zero_bias": True,
    "zero_bias_init": None,
    "gate": "layer",
}
"""Options that do nothing without zero tokens, at what they then have to be."""
WITH_ONE_CYCLE: Mapping[str, Any] = {"cycle_gate": "off", "training_cycles": "all", "deep_supervision": 0.0}
"""Options that do nothing where the middle layers run once, at what they then have to be."""
MANY_LAYERS = 1_000_000
"""Stands for a model whose layers are not known yet."""


@dataclass(frozen=True, kw_only=True)
class ZTTOptions:
    """How a decoder is made to run its middle layers several times.

    `gate`, `zero_query`, `zero_key_space`, `exit_kv` and the cycle gate are reconstructed: the paper's text
    on them was not available.
    """

    num_cycles: int = 2
    """How often the middle layers run."""
    num_head_layers: int = 1
    """First layers, which run once."""
    num_tail_layers: int = 1
    """Last layers, which run once."""
    zero_token: bool = True
    """Whether middle layers see the zero token; without it this is head-tail cycling."""
    zero_token_scope: Literal["layer_cycle", "layer", "cycle"] = "layer_cycle"
    """What has a key of its own: every layer in every cycle, every layer, or every cycle."""
    zero_key_space: Literal["head", "hidden"] = "head"
    """Whether the key is one of a head, or a hidden vector that goes through the layer's key projection."""
    zero_query: Literal["post_rope", "pre_rope"] = "post_rope"
    """Which query meets the zero key: the rotated one, or the one without position."""
    zero_bias: bool = True
    """Whether each query head adds a number of its own to its zero score."""
    zero_bias_init: float | None = None
    """Where that number starts; by default 0 from random weights, -6 in a converted model."""
    gate: Literal["layer", "attn", "none"] = "layer"
    """What attention to the zero token closes: the attention alone (`attn`, the same as `none`), or the
    layer's MLP too."""
    cycle_gate: Literal["off", "zero_init"] | None = None
    """`zero_init`: later cycles add what they change times a number that starts at 0; `off`: in full. By
    default `off` from random weights, `zero_init` in a converted model, which so starts as its base."""
    training_cycles: Literal["all", "grow", "sample"] = "all"
    """Cycles of a training step: all, from one to all over the first fifth of the run, or drawn anew in every
    step."""
    deep_supervision: float = 0.0
    """Weight, in training, of the mean loss of the earlier cycles, each read through the tail layers."""
    min_cycles: int = 1
    """Cycles before a token may leave early."""
    exit_level: Literal["batch", "sequence", "token"] = "sequence"
    """Who leaves together."""
    exit_criterion: Literal["zero_attention", "latent_diff", "entropy", "kl"] = "zero_attention"
    """What decides: attention to the zero token above the threshold, or a change below it: of the hidden
    state, of the prediction's entropy, or of the prediction."""
    exit_threshold: float | None = None
    """Where; by default nothing leaves early."""
    exit_kv: Literal["propagate", "copy", "share", "none"] = "propagate"
    """Keys and values of the cycles that a token left out: projected from its last state, copied from its
    last cycle, one place for all cycles, or none (all of a generation then run as many cycles as its
    prompt)."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ztt": {},
    "htc": {"zero_token": False},
    "bc": {"zero_token": False, "num_head_layers": 0, "num_tail_layers": 0},
}
"""The method and its baselines: head-tail cycling, and basic cycling of all layers."""


def physical_layers(config: Mapping[str, Any]) -> int:
    """Layers in the files of a config of ours or of a base."""
    return config.get("num_physical_layers") or config["num_hidden_layers"]


def cache_slots(config: Mapping[str, Any]) -> int:
    """Places of a cache: head, middle in every cycle (once where cycles share), tail."""
    outside = config["num_head_layers"] + config["num_tail_layers"]
    cycles = 1 if config["exit_kv"] == "share" else config["num_cycles"]
    return outside + cycles * (physical_layers(config) - outside)


def check(values: Mapping[str, Any], layers: int) -> None:
    """Refuse options that make no model of `layers` layers.

    Raises:
        InputError: begins with the option; says what was found and expected.
    """
    for key in ("num_cycles", "min_cycles"):
        check_cycles(key, values[key])
    for key in ("num_head_layers", "num_tail_layers"):
        _expect(key, values[key], values[key] >= 0, "at least 0")
    check_threshold(values["exit_threshold"])
    weight = values["deep_supervision"]
    _expect("deep_supervision", weight, 0 <= weight < math.inf, "a number from 0 on")
    outside = values["num_head_layers"] + values["num_tail_layers"]
    if layers < outside + 1:
        raise InputError(
            f"num_head_layers + num_tail_layers: {outside} of {layers} layers leave no middle to cycle; "
            f"expected at most {layers - 1}"
        )
    if values["min_cycles"] > values["num_cycles"]:
        raise InputError(
            f"min_cycles: {values['min_cycles']} is more than num_cycles, {values['num_cycles']}"
        )
    for key, allowed in (
        ("zero_token_scope", SCOPES),
        ("zero_key_space", KEY_SPACES),
        ("zero_query", QUERIES),
        ("gate", GATES),
        ("cycle_gate", CYCLE_GATES),
        ("training_cycles", SCHEDULES),
        ("exit_level", LEVELS),
        ("exit_criterion", CRITERIA),
        ("exit_kv", KV_POLICIES),
    ):
        if values[key] not in allowed:
            raise InputError(
                f"{key}: expected {', '.join(allowed)}, found {values[key]!r}"
                f"{nearest(str(values[key]), allowed)}"
            )
    if not values["zero_token"]:
        _expect_unused(values, WITHOUT_ZERO_TOKENS, "`zero_token` is false")
    elif not values["zero_bias"]:
        _expect_unused(values, {"zero_bias_init": None}, "`zero_bias` is false")
    if values["num_cycles"] == 1:
        _expect_unused(values, WITH_ONE_CYCLE, "`num_cycles` is 1")
    if values["exit_kv"] == "none" and values["exit_level"] != "batch":
        raise InputError(
            f"exit_kv: none needs `exit_level: batch`, found {values['exit_level']}: tokens that left would "
            "have no keys for those that go on"
        )
    by_zero = values["exit_criterion"] == "zero_attention"
    if by_zero and values["exit_threshold"] is not None and not values["zero_token"]:
        raise InputError(
            "exit_criterion: zero_attention needs zero tokens, and `zero_token` is false; take latent_diff, "
            "entropy or kl"
        )


def check_cycles(key: str, cycles: Any) -> None:
    """Refuse what is no number of cycles.

    Raises:
        InputError: begins with `key`.
    """
    whole = isinstance(cycles, int) and not isinstance(cycles, bool)
    _expect(key, cycles, whole and cycles >= 1, "a whole number of at least 1")


def check_threshold(threshold: Any) -> None:
    """Refuse what no signal can be compared with.

    Raises:
        InputError: the threshold is neither None nor a finite number.
    """
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    finite = number and math.isfinite(threshold)
    _expect("exit_threshold", threshold, threshold is None or finite, "a finite number or nothing")


def config_of(base: Mapping[str, Any], options: ZTTOptions, *, converting: bool) -> dict[str, Any]:
    """The content of `config.json` for a base's architecture with its middle cycled.

    Args:
        base: Content of the base's `config.json`.
        options: How.
        converting: Whether the base's weights are kept, which decides defaults.

    Raises:
        InputError: the architecture is none that we know, or the options don't fit it.
    """
    kind = base.get("model_type")
    if kind == MODEL_TYPE:
        raise InputError("model_type: ztt already; `resize_cycles` changes its number of cycles")
    if kind not in BASES:
        raise InputError(f"model_type: {kind} can't be cycled; expected one of {', '.join(BASES)}")
    made = {key: value for key, value in base.items() if key not in ("architectures", "layer_types")}
    made |= {"model_type": MODEL_TYPE, "architectures": ["ZTTForCausalLM"]}
    made |= {key: getattr(options, key) for key in ZTTOptions.__dataclass_fields__}
    if converting and options.zero_token and not options.zero_bias:
        raise InputError(
            "zero_bias: expected true, found false: without it zero tokens take a large share of the "
            "attention from the start, and the converted model does not begin as its base"
        )
    if options.zero_bias_init is None and options.zero_token and options.zero_bias:
        made["zero_bias_init"] = -6.0 if converting else 0.0
    if options.cycle_gate is None:
        made["cycle_gate"] = "zero_init" if converting and options.num_cycles > 1 else "off"
    # Each family's own defaults, said in our words.
    made["attention_bias"] = kind == "qwen2" or bool(base.get("attention_bias"))
    made["attention_output_bias"] = kind in ("llama", "qwen3") and bool(base.get("attention_bias"))
    made["qk_norm"] = kind == "qwen3"
    layers = base["num_hidden_layers"]
    types = _layer_types(base, layers)
    made["physical_layer_types"] = list(types) if "sliding_attention" in types else None
    made["sliding_window"] = base.get("sliding_window") if "sliding_attention" in types else None
    for key in ("use_sliding_window", "max_window_layers"):
        made.pop(key, None)
    made["num_physical_layers"] = layers
    check(made, layers)
    made["num_hidden_layers"] = cache_slots(made)
    return made


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a model of this config stores."""
    from weightsmith.testbed import parameter_shapes

    plain = {**config, "model_type": "llama", "num_hidden_layers": physical_layers(config)}
    shapes = parameter_shapes({**plain, "attention_bias": False})
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name in list(shapes):
        module, _, last = name.rpartition(".")
        part = module.rpartition(".")[2]
        if last == "weight" and (
            (part in ("q_proj", "k_proj", "v_proj") and config["attention_bias"])
            or (part == "o_proj" and config["attention_output_bias"])
        ):
            shapes[f"{module}.bias"] = shapes[name][:1]
        if config["qk_norm"] and part == "q_proj":
            attention = module.rpartition(".")[0]
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (head,)
    return {**shapes, **extra_shapes(config)}


def extra_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a base doesn't have: zero keys, their biases, gates of later cycles."""
    shapes: dict[str, tuple[int, ...]] = {}
    heads, cycles = config["num_attention_heads"], config["num_cycles"]
    if config["zero_token"]:
        keys = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or config["hidden_size"] // heads
        pool = pool_shape(config)
        width = (keys, head) if config["zero_key_space"] == "head" else (config["hidden_size"],)
        shapes[KEYS] = (*pool, *width)
        if config["zero_bias"]:
            shapes[SCORES] = (*pool, heads)
    if config["cycle_gate"] == "zero_init" and cycles > 1:
        shapes[CYCLES] = (cycles - 1,)
    return shapes


def pool_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Zero tokens there are: along cycles, along middle layers."""
    middle = physical_layers(config) - config["num_head_layers"] - config["num_tail_layers"]
    scope = config["zero_token_scope"]
    return (1 if scope == "layer" else config["num_cycles"], 1 if scope == "cycle" else middle)


def repeated_parameters(config: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Weights that a pass in training reads beyond the first time; 0 for models that aren't of ours.

    Args:
        config: Content of `config.json`.
        sizes: Elements of each tensor.
    """
    if config.get("model_type") != MODEL_TYPE:
        return 0
    from weightsmith.checkpoints.names import layer_index

    first, last = config["num_head_layers"], physical_layers(config) - config["num_tail_layers"]
    middle = range(first, last)
    again = sum(size for name, size in sizes.items() if layer_index(name) in middle)
    if config.get("deep_supervision"):
        head = "lm_head.weight" if "lm_head.weight" in sizes else "model.embed_tokens.weight"
        tail = sum(size for name, size in sizes.items() if (layer_index(name) or 0) >= middle.stop)
        again += tail + sizes[head]
    return (config["num_cycles"] - 1) * again


def _layer_types(base: Mapping[str, Any], layers: int) -> Sequence[str]:
    """`full_attention` or `sliding_attention` for each layer of a base."""
    if base.get("layer_types"):
        return base["layer_types"]
    window = base.get("sliding_window")
    if window is None or base["model_type"] == "llama":
        return ["full_attention"] * layers
    if base["model_type"] == "mistral":
        return ["sliding_attention"] * layers
    if not base.get("use_sliding_window"):
        return ["full_attention"] * layers
    full = base.get("max_window_layers", 28)
    return ["sliding_attention" if layer >= full else "full_attention" for layer in range(layers)]


def _expect(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{key}: expected {expected}, found {value!r}")


def _expect_unused(values: Mapping[str, Any], unused: Mapping[str, Any], why: str) -> None:
    for key, idle in unused.items():
        if values[key] != idle:
            raise InputError(f"{key}: {values[key]!r} has no effect, since {why}; leave it out")
