"""`ZTTConfig`: a Llama's config with its middle layers cycled."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from weightsmith.errors import InputError
from weightsmith.training.zero_token import options


class ZTTConfig(LlamaConfig):
    """Fields of `LlamaConfig`, of `ZTTOptions`, and those below.

    `num_hidden_layers` is what caches are made from: the places of a pass, not the layers in files. Given
    without `num_physical_layers` it is taken for the latter, so configs can be written by hand as usual.

    Attributes:
        num_physical_layers: Layers in files.
        physical_layer_types: `full_attention` or `sliding_attention` for each of them; None for all full.
        sliding_window: Keys that a sliding layer sees; the zero token is always seen.
        attention_bias: Whether projections of queries, keys and values have biases.
        attention_output_bias: Whether the output projection has one.
        qk_norm: Whether queries and keys are normalised, as in Qwen3.
        zero_token_impl: `auto`, `lse` or `concat`: how attention beside the zero token is computed.
        exit_curve: What `calibrate_exit` measured: mappings of threshold, cycles and loss.

    Raises:
        InputError: a value that makes no model.

    Example:
        >>> config = ZTTConfig(num_hidden_layers=4, num_cycles=3)
        >>> config.num_hidden_layers, ZTTConfig(**config.to_dict()).num_hidden_layers
        (8, 8)
    """

    model_type = options.MODEL_TYPE
    base_model_tp_plan = None  # attention to the zero token would need sums over ranks
    base_model_pp_plan = None
    # What a Trainer shows `compute_metrics` is the logits.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "past_key_values",
        "zero_attention",
        "num_cycles_used",
        "exit_signal",
    ]

    num_physical_layers: int | None = None
    num_cycles: int = 2
    num_head_layers: int = 1
    num_tail_layers: int = 1
    zero_token: bool = True
    zero_token_scope: str = "layer_cycle"
    zero_key_space: str = "head"
    zero_query: str = "post_rope"
    zero_bias: bool = True
    zero_bias_init: float | None = None
    zero_token_impl: str = "auto"
    gate: str = "layer"
    cycle_gate: str | None = None
    training_cycles: str = "all"
    deep_supervision: float = 0.0
    min_cycles: int = 1
    exit_threshold: float | None = None
    exit_level: str = "sequence"
    exit_criterion: str = "zero_attention"
    exit_kv: str = "propagate"
    exit_curve: list | None = None
    physical_layer_types: list | None = None
    layer_types: list | None = None
    sliding_window: int | None = None
    attention_output_bias: bool | None = None
    qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_physical_layers is None:
            self.num_physical_layers = self.num_hidden_layers
        if self.cycle_gate is None:
            self.cycle_gate = "off"
        if self.attention_output_bias is None:
            self.attention_output_bias = bool(self.attention_bias)
        if self.zero_token_impl not in options.IMPLEMENTATIONS:
            known = ", ".join(options.IMPLEMENTATIONS)
            raise InputError(f"zero_token_impl: expected {known}, found {self.zero_token_impl!r}")
        options.check(vars(self), self.num_physical_layers)
        self.num_hidden_layers = options.cache_slots(vars(self))
        given = self.physical_layer_types
        if given is not None and len(given) != self.num_physical_layers:
            raise InputError(f"physical_layer_types: {len(given)} of {self.num_physical_layers} layers")
        types = given or ["full_attention"] * self.num_physical_layers
        # `generate` makes the masks of a cache of fixed length by these.
        self.layer_types = [types[self.layer_of_slot(slot)] for slot in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    @property
    def layers_in_files(self) -> int:
        """`num_physical_layers`, which is set once a config is made."""
        return self.num_physical_layers or 0

    @property
    def middle(self) -> range:
        """The layers that cycle."""
        return range(self.num_head_layers, self.layers_in_files - self.num_tail_layers)

    def slot(self, layer: int, cycle: int = 0, cycles: int | None = None) -> int:
        """The cache's place of a layer in a cycle, in a cache for `cycles` of them."""
        shared, middle = self.exit_kv == "share", self.middle
        if layer in middle:
            return layer if shared else layer + cycle * len(middle)
        if layer < middle.start or shared:
            return layer
        return layer + ((cycles or self.num_cycles) - 1) * len(middle)

    def layer_of_slot(self, slot: int) -> int:
        """The layer whose keys a place of the cache holds."""
        first, length = self.num_head_layers, len(self.middle)
        cycled = self.num_hidden_layers - self.num_head_layers - self.num_tail_layers
        if slot < first:
            return slot
        return first + (slot - first) % length if slot < first + cycled else slot - cycled + length


__all__ = ["ZTTConfig"]
