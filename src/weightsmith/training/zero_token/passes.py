"""One forward pass: what its layers share, and where their keys and values go.

A layer's place in the cache depends on the cycle. Places are never left of unequal length: masks are made
from the first one's, so tokens that left early leave keys and values in the places of cycles they skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from weightsmith.errors import InputError
from weightsmith.training.zero_token.config import ZTTConfig
from weightsmith.training.zero_token.layers import Zero, ZTTDecoderLayer

if TYPE_CHECKING:
    from weightsmith.training.zero_token.modeling import ZTTModel

logger = logging.get_logger(__name__)


class Pass:
    """What the layers of one forward pass share, and where their keys go."""

    def __init__(
        self,
        model: ZTTModel,
        positions: tuple[Tensor, Tensor],
        masks: dict[tuple[bool, bool], Any],
        cache: Any,
        cycles: int,
        kwargs: dict[str, Any],
    ) -> None:
        self.config, self.positions, self.masks = model.config, positions, masks
        # Attributes of a config pass through several layers of Python; what every layer asks is read once.
        self._middle, self._shares = model.config.middle, model.config.exit_kv == "share"
        self.cache, self.kwargs = cache, kwargs
        self.held, self.goes_on = cycles, False
        if cache is not None:
            self.held, self.goes_on = _held_cycles(cache, self.config, cycles)
        if cache is not None and self._shares:
            logger.warning_once(
                "exit_kv share: a pass with a cache sees the last cycle of earlier tokens, one without sees "
                "the same cycle; their results differ, and training is without"
            )
        self._places = max(model.config.num_cycles, self.held)
        # Without a cache too: later tokens of the same pass read these keys. In training nothing leaves.
        self._keeps = self.config.exit_kv == "copy" and not model.training
        self._last: dict[int, tuple[Tensor, ...]] = {}
        self._left: Tensor | None = None

    def start_cycle(self, cycle: int, active: Tensor | None) -> None:
        """Note who has left; a shared place forgets these tokens' keys of the cycle before."""
        self._left = None if active is None else ~active
        if cycle and self.cache is not None and self._shares:
            tokens = self.positions[0].shape[1]
            for layer in self._middle:
                place: Any = self.cache.layers[self.config.slot(layer)]
                if not getattr(place, "is_croppable", False):
                    raise InputError(
                        f"exit_kv: share needs a cache that can be cut back, found {type(place).__name__}"
                    )
                place.crop(-tokens)

    def layer(
        self,
        layer: ZTTDecoderLayer,
        states: Tensor,
        *,
        cycle: int = 0,
        zero: Zero | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Call a layer in a cycle."""
        attention = layer.self_attn
        number = attention.layer_idx
        given = None
        if self._keeps and number in self._middle:
            given = self._keys_and_values(layer, states)
            if self._left is not None:
                left = self._left[:, None, :, None]
                pairs = zip(self._last[number], given, strict=True)
                given = tuple(torch.where(left, old, new) for old, new in pairs)
            self._last[number] = given
        found = layer(
            states,
            position_embeddings=self.positions,
            attention_mask=self.masks[attention.is_sliding, zero is not None],
            past_key_values=self.cache,
            slot=self.config.slot(number, cycle, self._places),
            zero=zero,
            rows=rows,
            given=given,
            **self.kwargs,
        )
        # A layer left out in a step of training gives back its input alone.
        return found if isinstance(found, tuple) else (found, None)

    def fill(self, middle: Sequence[ZTTDecoderLayer], states: Tensor, done: int, used: Tensor) -> None:
        """Keys and values for the cycles that no token ran: places of a cache are never of unequal length."""
        if self.cache is None or self._shares:
            return
        if self.config.exit_kv == "none":
            self.cache.ztt_cycles = done
            return
        for layer in middle:
            if done == self.held:
                return
            number = layer.self_attn.layer_idx
            pair = self._last.get(number) or self._keys_and_values(layer, states)
            for cycle in range(done, self.held):
                self.cache.update(*pair, self.config.slot(number, cycle, self._places))

    def _keys_and_values(self, layer: ZTTDecoderLayer, states: Tensor) -> tuple[Tensor, ...]:
        # Not a call of the layer, which is what FSDP2 gathers its weights for.
        parts: list[Any] = [part for part in (layer, layer.self_attn) if hasattr(part, "unshard")]
        for part in parts:
            part.unshard()
        pair = layer.self_attn.keys_and_values(layer.input_layernorm(states), self.positions)
        for part in parts:
            part.reshard()
        return pair


def new_cache(config: ZTTConfig, cycles: int | None = None) -> DynamicCache:
    """A growing cache with places for `cycles`, by default as many as the config's."""
    return DynamicCache(config=cache_config(config, cycles))


def cache_config(config: ZTTConfig, cycles: int | None) -> ZTTConfig:
    """What to make a cache from: the config, with places for `cycles` where these are more than its own."""
    if cycles is None or cycles <= config.num_cycles:
        return config
    return ZTTConfig.from_dict({**config.to_dict(), "num_cycles": cycles})


def _held_cycles(cache: Any, config: ZTTConfig, cycles: int) -> tuple[int, bool]:
    """Cycles whose keys the cache has from every token so far, and whether there are any yet.

    Raises:
        InputError: this pass wants more cycles, or places, than the cache has.
    """
    held = getattr(cache, "ztt_cycles", None)
    seen = cache.get_seq_length()  # a tensor in caches of fixed length, whose value is not asked for
    if held is not None and not (isinstance(seen, int) and seen == 0):
        if cycles > held and config.exit_kv not in ("share", "none"):
            raise InputError(f"num_cycles: {cycles} asked, but the cache holds keys of {held} cycles")
        return held, True
    cache.ztt_cycles = cycles
    needed = config.slot(config.layers_in_files - 1, cycles - 1, max(cycles, config.num_cycles)) + 1
    if len(cache.layers) < needed and getattr(cache, "layer_class_to_replicate", None) is None:
        raise InputError(
            f"past_key_values: {len(cache.layers)} places, {cycles} cycles need {needed}; make it with "
            "`new_cache(config, cycles)`"
        )
    return cycles, False
