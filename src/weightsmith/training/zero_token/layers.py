"""The layers of a Zero-Token Transformer: a Llama's, which know of a zero token and can be called again.

Letters B rows, T tokens, D width, H query heads, G key heads
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
    rotate_half,
)

from weightsmith.training.zero_token import options
from weightsmith.training.zero_token.attention import zero_attention, zero_scores
from weightsmith.training.zero_token.config import ZTTConfig

Zero = tuple[Tensor, Tensor | None]
"""Key of a zero token, (G, head width) or (D,), and its bias for each query head."""


class ZeroTokens(nn.Module):
    """The zero keys of all cycles and middle layers, and their biases.

    Both are named as biases (the key after `nn.MultiheadAttention`'s), which trainers leave out of weight
    decay.
    """

    def __init__(self, config: ZTTConfig) -> None:
        super().__init__()
        shapes = options.extra_shapes(vars(config))
        self.cycles, self.layers = options.pool_shape(vars(config))
        self.bias_k = nn.Parameter(torch.empty(shapes[options.KEYS]))
        biased = options.SCORES in shapes
        self.bias_z = nn.Parameter(torch.empty(shapes[options.SCORES])) if biased else None

    def at(self, cycle: int, layer: int) -> Zero:
        """The token of a middle layer (counted from the first of them); later cycles than there are have the
        last one's.
        """
        place = min(cycle, self.cycles - 1), min(layer, self.layers - 1)
        return self.bias_k[place], None if self.bias_z is None else self.bias_z[place]


class CycleGate(nn.Module):
    """How much of what later cycles change is kept: one number for each, 0 at first."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(cycles - 1))

    def forward(self, before_BTD: Tensor, after_BTD: Tensor, cycle: int) -> Tensor:
        """The state after a cycle from 1 on."""
        share = self.bias[min(cycle, len(self.bias)) - 1].to(after_BTD.dtype)
        return before_BTD + share * (after_BTD - before_BTD)


class ZTTAttention(nn.Module):
    """Attention of one layer, beside a zero token where it gets one."""

    def __init__(self, config: ZTTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads = config.num_attention_heads
        groups = config.num_key_value_heads or heads
        self.head_dim: int = config.head_dim or config.hidden_size // heads
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = float(config.attention_dropout or 0.0)
        self.is_causal = True
        types = config.physical_layer_types
        self.is_sliding = types is not None and types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if self.is_sliding else None
        queries, keys = heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bool(config.attention_output_bias))
        # Attributes of a config pass through several layers of Python; those that don't change are read once.
        self.qk_norm = config.qk_norm
        self.hidden_keys = config.zero_key_space == "hidden"
        self.scores_rotated = config.zero_query == "post_rope"
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def heads(self, projection: nn.Linear, states_BTD: Tensor) -> Tensor:
        """(B, heads, T, head width) of one projection, normalised where the model does that."""
        split = projection(states_BTD).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm and projection is not self.v_proj:
            split = (self.q_norm if projection is self.q_proj else self.k_norm)(split)
        return split.transpose(1, 2)

    def keys_and_values(self, states_BTD: Tensor, positions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What a token leaves for those after it."""
        return _rotated(self.heads(self.k_proj, states_BTD), *positions), self.heads(self.v_proj, states_BTD)

    def forward(
        self,
        states_BTD: Tensor,
        *,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        slot: int = 0,
        zero: Zero | None = None,
        rows: Tensor | None = None,
        given: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention of `rows` (all by default).

        Args:
            states_BTD: Normalised states of all rows: their keys go into the cache.
            position_embeddings: Cosines and sines.
            attention_mask: As the backend takes it.
            past_key_values: The cache.
            slot: Its place.
            zero: The zero token.
            rows: Indices of the rows that attend.
            given: Keys and values of these tokens, where they are not those of `states_BTD`.
            **kwargs: For the backend.

        Returns:
            What is added to the states of those rows; attention weights of the eager backend; a0 (rows, T),
            mean over heads.
        """
        keys, values = given or self.keys_and_values(states_BTD, position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, slot)
        if rows is not None:
            states_BTD, keys, values = states_BTD[rows], keys[rows], values[rows]
            position_embeddings = tuple(x if x.shape[0] == 1 else x[rows] for x in position_embeddings)
            if isinstance(attention_mask, Tensor) and attention_mask.shape[0] > 1:
                attention_mask = attention_mask[rows]
        plain = self.heads(self.q_proj, states_BTD)
        queries = _rotated(plain, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        backend = self.config._attn_implementation or "eager"
        if zero is None:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
            if self.sliding_window is not None:
                kwargs["sliding_window"] = self.sliding_window
            out, weights = interface(
                self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.o_proj(out.flatten(2)), weights, None
        key, bias = zero
        if self.hidden_keys:
            key = self.heads(self.k_proj, key[None, None])[0, :, 0]
        query = queries if self.scores_rotated else plain
        found = zero_attention(
            queries,
            keys,
            values,
            zero_scores(query, key, bias, self.scaling),
            attention_mask,
            scaling=self.scaling,
            backend=backend,
            implementation=self.config.zero_token_impl,
            is_causal=queries.shape[2] > 1,
            dropout=dropout,
        )
        out = self.o_proj(found.out_BTHD.flatten(2))  # called as a module: an adapter may stand around it
        return out, found.weights_BHTS, found.share_BHT.mean(1)


class ZTTDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer that can be called in several cycles."""

    def __init__(self, config: ZTTConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = config.gate
        self.self_attn = ZTTAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, states_BTD: Tensor, *, zero: Zero | None = None, rows: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """States after the layer (those of other rows than `rows` as they were), and a0 (rows, T)."""
        added, _, share = self.self_attn(self.input_layernorm(states_BTD), zero=zero, rows=rows, **kwargs)
        open_BT1 = None
        if share is not None and self.gate == "layer":
            open_BT1 = (1 - share).unsqueeze(-1).to(added.dtype)
        if open_BT1 is not None and (bias := self.self_attn.o_proj.bias) is not None:
            added = added - (1 - open_BT1) * bias  # the attention is scaled already, its bias is not
        states = (states_BTD if rows is None else states_BTD[rows]) + added
        change = self.mlp(self.post_attention_layernorm(states))
        states = states + (change if open_BT1 is None else open_BT1 * change)
        return (states if rows is None else states_BTD.index_copy(0, rows, states)), share


def _rotated(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotary embedding of queries or keys alone; transformers' function wants both."""
    return x_BHTK * cos_BTK.unsqueeze(1) + rotate_half(x_BHTK) * sin_BTK.unsqueeze(1)
