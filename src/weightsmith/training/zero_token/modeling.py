"""The Zero-Token Transformer: a decoder whose middle layers run several times over the same weights.

    h = embed; h = head layers(h)
    for c in 0..n-1:  h' = h;  for l in middle:  h = layer_l(h; c);  h = h' + g_c (h - h')
    logits = lm_head(norm(tail layers(h)))

    layer(h; c):  y, a0 = attention(norm(h)) beside the zero token (l, c);  h = h + o_proj(y)
                  h = h + (1 - mean_heads a0) mlp(norm(h))

Rotary embedding, norm and MLP are transformers' own of the Llama, so a model with one cycle and no zero
token is the base. Source: arXiv:2502.12214; there is no public code. Reconstructed, each with its option: the
form of the gate, the unrotated key, what an early token leaves in the cache. The gates g_c are ours.

Letters B rows, T tokens, D width, H query heads, G key heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from weightsmith.errors import InputError
from weightsmith.training.zero_token import options
from weightsmith.training.zero_token.attention import additive_mask, choose, computed_in
from weightsmith.training.zero_token.config import ZTTConfig
from weightsmith.training.zero_token.exits import ReadOut, leaves, real_tokens, signal
from weightsmith.training.zero_token.files import check_pool
from weightsmith.training.zero_token.layers import CycleGate, ZeroTokens, ZTTAttention, ZTTDecoderLayer
from weightsmith.training.zero_token.passes import Pass, cache_config, new_cache

logger = logging.get_logger(__name__)


@dataclass
class ZTTModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, and what the cycles did.

    Attributes:
        zero_attention: Mean over heads of attention to the zero token, (cycles, middle layers, B, T), NaN in
            cycles that did not run; with `output_zero_attention`.
        num_cycles_used: Cycles of each row (B,), of each token (B, T) where tokens leave one by one.
        exit_signal: What the exit criterion says after each cycle, (cycles, B, T), NaN where it is not asked;
            with `output_exit_signal`.
        earlier_states: `last_hidden_state` had the pass ended after each cycle but the last, (B, T, D) each;
            with `output_earlier_states`.
    """

    zero_attention: Tensor | None = None
    num_cycles_used: Tensor | None = None
    exit_signal: Tensor | None = None
    earlier_states: tuple[Tensor, ...] | None = None


@dataclass
class ZTTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and what the cycles did, as in `ZTTModelOutputWithPast`."""

    zero_attention: Tensor | None = None
    num_cycles_used: Tensor | None = None
    exit_signal: Tensor | None = None


class ZTTPreTrainedModel(PreTrainedModel):
    """What `ZTTModel` and `ZTTForCausalLM` share."""

    config: ZTTConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = ZTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ZTTDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ZTTDecoderLayer, "attentions": ZTTAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroTokens):
            init.normal_(module.bias_k, mean=0.0, std=options.KEY_STD)
            if module.bias_z is not None:
                init.constant_(module.bias_z, self.config.zero_bias_init or 0.0)
        elif isinstance(module, CycleGate):
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: the folder's zero tokens are those of other cycles, layers or heads.
        """
        # Files of a variant have names that are transformers' own matter.
        if source is not None and kwargs.get("variant") is None:
            check_pool(Path(source) / (kwargs.get("subfolder") or ""), kwargs.get("config"))
        return super().from_pretrained(source, *args, **kwargs)


class ZTTModel(ZTTPreTrainedModel):
    """The decoder without its output projection.

    Args:
        config: Its shape and cycles.

    Attributes:
        cycles_now: Cycles of a pass in training where a schedule sets it; None for all of them.
    """

    def __init__(self, config: ZTTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [ZTTDecoderLayer(config, layer) for layer in range(config.layers_in_files)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.zero_token = ZeroTokens(config) if config.zero_token else None
        gated = config.cycle_gate == "zero_init" and config.num_cycles > 1
        self.cycle_gate = CycleGate(config.num_cycles) if gated else None
        self.gradient_checkpointing = False
        self.cycles_now: int | None = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_cycles: int | None = None,
        exit_threshold: float | None = None,
        exit_level: str | None = None,
        allow_extrapolation: bool = False,
        output_zero_attention: bool = False,
        output_exit_signal: bool = False,
        output_earlier_states: bool = False,
        read_out: ReadOut | None = None,
        **kwargs: Any,
    ) -> ZTTModelOutputWithPast:
        """States of the last layer, normalised.

        Args:
            input_ids: Token ids (B, T).
            attention_mask: False for padding, (B, all tokens so far); or a mask as the backend takes it.
            position_ids: (B or 1, T); by default counted on from the cache, padding left out.
            past_key_values: A cache of `config.num_hidden_layers` places.
            inputs_embeds: Embeddings (B, T, D) instead of ids.
            use_cache: Make a cache where none is given.
            num_cycles: Cycles of this pass; by default the config's.
            exit_threshold: Of the config's criterion; by default the config's. Never leaves early in
                training.
            exit_level: By default the config's.
            allow_extrapolation: Allow more cycles than were trained; the last one's keys are taken again.
            output_zero_attention: Return attention to the zero token.
            output_exit_signal: Return what the exit criterion says, whether anything leaves or not.
            output_earlier_states: Run the tail layers after every cycle and return their states; recorded
                hidden states and attentions hold those passes as well. Needs a pass without a cache.
            read_out: Logits from states, for the criteria `entropy` and `kl`.
            **kwargs: For the attention backend.

        Raises:
            InputError: more cycles than trained, or than the cache holds; an unknown level; a threshold that
                is no number; a criterion that the model can't tell; a backend that can't show a zero token;
                earlier states beside a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected either input_ids or inputs_embeds")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cycles = self._cycles(num_cycles, allow_extrapolation)
        threshold, level = self._exit(exit_threshold, exit_level)
        if threshold is not None or output_exit_signal:
            self._check_criterion(read_out)
        self._check_backend(kwargs)
        if output_earlier_states and past_key_values is not None:
            raise InputError(
                "past_key_values: given, but earlier cycles' states (`deep_supervision`) need a pass without"
            )
        if use_cache and past_key_values is None and not output_earlier_states:
            past_key_values = new_cache(self.config, cycles)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = _positions(states.shape[1], past, attention_mask, states.device)
        positions = self.rotary_emb(states, position_ids=position_ids)
        masks = self._masks(states, attention_mask, past_key_values, position_ids)
        real = real_tokens(attention_mask, states.shape[1], past) if threshold is not None else None
        run = Pass(self, positions, masks, past_key_values, cycles, kwargs)
        if self.config.exit_kv == "none" and run.goes_on:
            cycles, threshold = run.held, None  # the prompt decided for all that follows it

        head, middle, tail = self.parts()
        for layer in head:
            states, _ = run.layer(layer, states)
        used = torch.full(states.shape[:2], cycles, dtype=torch.long, device=states.device)
        active: Tensor | None = None  # tokens (B, T) still cycling; None for all
        rows: Tensor | None = None
        every: list[Tensor] = []
        signals: list[Tensor] = []
        earlier: list[Tensor] = []
        done = 0
        for cycle in range(cycles):
            before, shares = states, []
            run.start_cycle(cycle, active)
            for place, layer in enumerate(middle):
                zero = self.zero_token.at(cycle, place) if self.zero_token is not None else None
                after, share = run.layer(layer, states, cycle=cycle, zero=zero, rows=rows)
                states = after if active is None else torch.where(active.unsqueeze(-1), after, states)
                if share is not None:
                    shares.append(share if rows is None else _spread(share, rows, states.shape[0]))
            if cycle and self.cycle_gate is not None:
                states = self.cycle_gate(before, states, cycle)
            done = cycle + 1
            if output_earlier_states and done < cycles:
                earlier.append(states)
            if output_zero_attention and shares:
                every.append(torch.stack(shares))
            asked = threshold if self.config.min_cycles <= done < cycles else None
            if asked is None and not output_exit_signal:
                continue
            mean = torch.stack(shares).mean(0) if shares else None
            found = signal(self.config.exit_criterion, mean, before, states, read_out)
            signals.append(found)
            if asked is None:
                continue
            leaving = leaves(self.config.exit_criterion, level, found, asked, real)
            now = leaving if active is None else leaving & active
            used = used.masked_fill(now, done)
            active = ~now if active is None else active & ~now
            going = active.any(1).tolist()  # the one synchronisation of a cycle
            if not any(going):
                break
            rows = None if all(going) else torch.tensor(going, device=states.device).nonzero()[:, 0]
        run.fill(middle, states, done, used)
        if self.training and self.cycle_gate is not None:
            states = states + 0.0 * self.cycle_gate.bias.sum().to(states.dtype)  # used by every rank
        states, *earlier = [self._finished(run, tail, each) for each in (states, *earlier)]
        return ZTTModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=past_key_values,
            zero_attention=_padded(every, cycles) if output_zero_attention and every else None,
            num_cycles_used=used if level == "token" else used.amax(1),
            exit_signal=_padded(signals, cycles) if output_exit_signal and signals else None,
            earlier_states=tuple(earlier) if output_earlier_states else None,
        )

    def _finished(self, run: Pass, tail: Sequence[ZTTDecoderLayer], states: Tensor) -> Tensor:
        """States through the tail layers, normalised."""
        for layer in tail:
            states, _ = run.layer(layer, states)
        return self.norm(states)

    def parts(self) -> tuple[Sequence[ZTTDecoderLayer], Sequence[ZTTDecoderLayer], Sequence[ZTTDecoderLayer]]:
        """Head, middle and tail layers."""
        layers: list[Any] = list(self.layers)
        first, last = self.config.middle.start, self.config.middle.stop
        return layers[:first], layers[first:last], layers[last:]

    def _cycles(self, asked: int | None, allow_extrapolation: bool) -> int:
        if asked is None:
            unscheduled = self.cycles_now is None and self.config.training_cycles != "all"
            # A warning has no place in a compiled graph.
            if self.training and unscheduled and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"training_cycles {self.config.training_cycles}: nothing sets the cycles of a step, so "
                    "all run; give the Trainer `callbacks=[CycleSchedule(model)]`"
                )
            return self.cycles_now or self.config.num_cycles if self.training else self.config.num_cycles
        options.check_cycles("num_cycles", asked)
        if asked > self.config.num_cycles and not allow_extrapolation:
            raise InputError(
                f"num_cycles: {asked} asked, {self.config.num_cycles} trained; `allow_extrapolation=True` "
                "takes the last cycle's zero tokens again, `resize_cycles` makes room for training"
            )
        return asked

    def _exit(self, threshold: float | None, level: str | None) -> tuple[float | None, str]:
        level = self.config.exit_level if level is None else level
        if level not in options.LEVELS:
            raise InputError(f"exit_level: expected {', '.join(options.LEVELS)}, found {level!r}")
        if self.config.exit_kv == "none" and level != "batch":
            raise InputError(f"exit_kv none needs exit_level batch, found {level}")
        threshold = self.config.exit_threshold if threshold is None else threshold
        options.check_threshold(threshold)
        return None if self.training else threshold, level

    def _check_criterion(self, read_out: ReadOut | None) -> None:
        criterion = self.config.exit_criterion
        if criterion == "zero_attention" and self.zero_token is None:
            raise InputError(
                "exit_criterion: zero_attention, and the model has no zero tokens; set exit_criterion to "
                "latent_diff, entropy or kl"
            )
        if criterion in options.READ_CRITERIA and read_out is None:
            raise InputError(
                f"exit_criterion: {criterion} reads predictions, which a {type(self).__name__} does not "
                "make; take ZTTForCausalLM, or exit_criterion latent_diff"
            )

    def _check_backend(self, kwargs: dict[str, Any]) -> None:
        backend = self.config._attn_implementation
        if kwargs.get("output_attentions", self.config.output_attentions) and backend != "eager":
            raise InputError(f"output_attentions: needs attn_implementation eager, found {backend}")
        if self.zero_token is not None:
            choose(str(backend), self.config.zero_token_impl, self.norm.weight.device.type, 0.0)

    def _masks(
        self, states: Tensor, attention_mask: Any, cache: Cache | None, position_ids: Tensor
    ) -> dict[tuple[bool, bool], Any]:
        """(sliding, beside a zero token) -> the mask of such layers."""
        given = attention_mask if isinstance(attention_mask, dict) else None
        made: dict[tuple[bool, bool], Any] = {}
        types = self.config.physical_layer_types or ["full_attention"]
        for sliding in {kind == "sliding_attention" for kind in types}:
            if given is not None:  # `generate` makes them itself for caches of fixed length
                mask = given["sliding_attention" if sliding else "full_attention"]
            else:
                make = create_sliding_window_causal_mask if sliding else create_causal_mask
                mask = make(
                    config=self.config,
                    inputs_embeds=states,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    position_ids=position_ids,
                )
            made[sliding, False] = mask
            # Made once for all layers and cycles; a float mask would do for the others too, more slowly.
            made[sliding, True] = additive_mask(mask, computed_in(states))
        return made


class ZTTForCausalLM(ZTTPreTrainedModel, GenerationMixin):
    """A causal language model with cycles; works with `generate`, Trainer, PEFT and `AutoModelForCausalLM`.

    Example:
        >>> config = ZTTConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                    num_attention_heads=2, num_cycles=3)
        >>> model = ZTTForCausalLM(config).eval()
        >>> out = model(torch.tensor([[1, 2, 3]]), num_cycles=2)
        >>> out.logits.shape, out.num_cycles_used
        (torch.Size([1, 3, 50]), tensor([2]))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ZTTConfig) -> None:
        super().__init__(config)
        self.model = ZTTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_cycles: int | None = None,
        exit_threshold: float | None = None,
        exit_level: str | None = None,
        allow_extrapolation: bool = False,
        output_zero_attention: bool = False,
        output_exit_signal: bool = False,
        **kwargs: Any,
    ) -> ZTTCausalLMOutputWithPast:
        """Logits, and the loss where there are `labels`; other arguments as `ZTTModel.forward`.

        In training with `deep_supervision` w, the loss of n cycles is loss_n + w mean(loss_1 .. loss_n-1),
        where loss_c is that of a pass with c cycles.
        """
        supervised = self.training and labels is not None and self.config.deep_supervision > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_cycles=num_cycles,
            exit_threshold=exit_threshold,
            exit_level=exit_level,
            allow_extrapolation=allow_extrapolation,
            output_zero_attention=output_zero_attention,
            output_exit_signal=output_exit_signal,
            output_earlier_states=supervised,
            read_out=self.read_out if self.config.exit_criterion in options.READ_CRITERIA else None,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            given = {"labels": labels, "vocab_size": self.config.vocab_size, **kwargs}
            loss = self.loss_function(logits=logits, **given)
            if outputs.earlier_states:
                earlier = [
                    self.loss_function(logits=self.lm_head(states), **given)
                    for states in outputs.earlier_states
                ]
                loss = loss + self.config.deep_supervision * torch.stack(earlier).mean()
        return ZTTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            zero_attention=outputs.zero_attention,
            num_cycles_used=outputs.num_cycles_used,
            exit_signal=outputs.exit_signal,
        )

    def _prepare_cache_for_generation(  # pyrefly: ignore[bad-override]
        self, generation_config: Any, model_kwargs: Any, *args: Any
    ) -> Any:
        # Every kind of cache is made from the model's config, which tells the places of its own cycles.
        own = self.config
        cycles = self.model._cycles(
            model_kwargs.get("num_cycles"), model_kwargs.get("allow_extrapolation", False)
        )
        self.config = cache_config(own, cycles)
        try:
            maker: Any = super()
            return maker._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        finally:
            self.config = own

    def read_out(self, states_BTD: Tensor) -> Tensor:
        """Logits of a state between cycles, without the tail layers."""
        return self.lm_head(self.model.norm(states_BTD))


def _positions(tokens: int, past: Any, attention_mask: Any, device: torch.device) -> Tensor:
    """Positions (B or 1, T) counted from a row's first token that is no padding, where the mask tells it: the
    score of a rotated query against an unrotated key depends on where it stands.
    """
    whole = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    if whole and not (isinstance(past, int) and attention_mask.shape[1] != past + tokens):
        return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens:]
    return (torch.arange(tokens, device=device) + past).unsqueeze(0)


def _spread(share_RT: Tensor, rows: Tensor, number: int) -> Tensor:
    """Values of some rows among all; NaN for the others."""
    whole = share_RT.new_full((number, share_RT.shape[1]), torch.nan)
    return whole.index_copy(0, rows, share_RT)


def _padded(every: list[Tensor], cycles: int) -> Tensor:
    """All cycles' shares as one tensor; NaN for cycles that did not run."""
    missing = [torch.full_like(every[0], torch.nan)] * (cycles - len(every))
    return torch.stack([*every, *missing])


AutoConfig.register(options.MODEL_TYPE, ZTTConfig, exist_ok=True)
AutoModel.register(ZTTConfig, ZTTModel, exist_ok=True)
AutoModelForCausalLM.register(ZTTConfig, ZTTForCausalLM, exist_ok=True)
