"""The model with cycles: its limits, its cache, early exit, what it saves and what it refuses."""

import copy
import dataclasses
import itertools

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from weightsmith.errors import CheckpointError, InputError
from weightsmith.training import ZTTConfig, ZTTForCausalLM, resize_cycles
from weightsmith.training.zero_token import passes
from weightsmith.training.zero_token.exits import real_tokens
from weightsmith.training.zero_token.options import extra_shapes, repeated_parameters
from weightsmith.training.zero_token.passes import new_cache

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model(seed=0, **options):
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    made = ZTTForCausalLM(ZTTConfig(**{**SMALL, **options})).eval()
    if made.model.zero_token is not None:  # keys that matter
        with torch.no_grad():
            made.model.zero_token.bias_k.normal_()
    return made


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def close(found, wanted, mask=None, atol=1e-5):
    mask = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=atol)


def stepwise(net, ids, cache, mask=None, cuts=(4, 5, 6, 7), **options):
    """Logits of pieces that go through a cache one after another."""
    parts, start = [], 0
    for stop in cuts:
        seen = None if mask is None else mask[:, :stop]
        out = net(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True, **options)
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1)


# --- limits ---------------------------------------------------------------------------------------------


def test_one_cycle_without_zero_token_is_the_llama(ids, left_padded):
    base, net = llama(), model(num_cycles=1, zero_token=False)
    net.load_state_dict(base.state_dict())
    with torch.no_grad():
        given = {"attention_mask": left_padded}
        close(net(ids, **given).logits, base(ids, **given).logits, left_padded)
        made = [each.generate(ids, **given, max_new_tokens=6, do_sample=False) for each in (net, base)]
    assert torch.equal(*made)


@pytest.mark.parametrize("cycles", [2, 3])
def test_closed_cycle_gates_without_zero_token_are_the_llama(ids, cycles):
    base, net = llama(), model(num_cycles=cycles, zero_token=False, cycle_gate="zero_init")
    net.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        close(net(ids).logits, base(ids).logits)


@torch.no_grad()
def test_cycles_are_the_middle_layers_again(ids):
    """Against a Llama with the layers written out: head, middle twice, tail; and all layers twice."""
    for options, order in (
        ({"num_cycles": 2}, [0, 1, 2, 1, 2, 3]),
        ({"num_cycles": 2, "num_head_layers": 0, "num_tail_layers": 0}, [0, 1, 2, 3, 0, 1, 2, 3]),
    ):
        net = model(zero_token=False, **options)
        torch.manual_seed(0)
        deep = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": len(order)})).eval()
        deep.model.embed_tokens, deep.model.norm = net.model.embed_tokens, net.model.norm
        deep.lm_head = net.lm_head
        for place, layer in enumerate(order):
            deep.model.layers[place].load_state_dict(net.model.layers[layer].state_dict())
        close(net(ids).logits, deep(ids).logits)


@torch.no_grad()
def test_a_layer_whose_attention_all_goes_to_the_zero_token_is_the_identity(ids):
    net = model(num_cycles=2, attention_bias=True)
    net.model.zero_token.bias_z.fill_(1e4)
    for layer in net.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    out = net(ids, output_hidden_states=True, output_zero_attention=True)
    assert (out.zero_attention == 1).all()
    head, last = out.hidden_states[1], out.hidden_states[-2]
    close(last, head)
    net.config.gate = "attn"
    for layer in net.model.layers:
        layer.gate = "attn"
    assert (net(ids, output_hidden_states=True).hidden_states[-2] - head).abs().max() > 0.1


@torch.no_grad()
def test_zero_attention_is_what_attention_to_keys_leaves_over(ids, left_padded):
    net = model(num_cycles=2, attn_implementation="eager")
    out = net(ids, attention_mask=left_padded, output_zero_attention=True, output_attentions=True)
    assert out.zero_attention.shape == (2, 2, 2, 7)
    assert len(out.attentions) == len(out.hidden_states or out.attentions) == 6
    for cycle in range(2):
        for place in range(2):
            weights = out.attentions[1 + 2 * cycle + place].sum(-1).mean(1)
            close(out.zero_attention[cycle, place], 1 - weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_token_scope": "layer"},
        {"zero_token_scope": "cycle"},
        {"zero_key_space": "hidden", "qk_norm": True},
        {"zero_query": "pre_rope", "zero_bias": False},
        {"gate": "attn", "cycle_gate": "zero_init"},
    ],
    ids=str,
)
def test_backends_agree_for_every_kind_of_zero_token(ids, left_padded, options):
    nets = [model(num_cycles=2, attn_implementation=kind, **options) for kind in ("sdpa", "eager")]
    nets.append(model(num_cycles=2, zero_token_impl="concat", **options))
    labels = ids.masked_fill(left_padded == 0, -100)
    labels[0, 3] = -100  # the first token's prediction is made at a place that sees nothing
    for net in nets:
        net(ids, attention_mask=left_padded, labels=labels).loss.backward()
    for net in nets[1:]:
        for one, other in zip(nets[0].parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_query_without_position_has_the_same_zero_score_everywhere():
    same = torch.full((1, 6), 5)
    near = [
        model(zero_query=kind, num_cycles=1, num_head_layers=0, zero_bias=False)(
            same, output_zero_attention=True
        ).zero_attention[0, 0, 0]
        for kind in ("pre_rope", "post_rope")
    ]
    # All keys are of the same token, so LSE differs by position through rotation alone; the last query's
    # odds against one key of its own position are s + log 1 at position 0 in both.
    assert torch.allclose(near[0][0], near[1][0])
    assert not torch.allclose(near[0], near[1], atol=1e-4)


# --- gradients ------------------------------------------------------------------------------------------


def test_a_shared_layers_gradient_is_the_sum_over_its_cycles(ids):
    net = model(num_cycles=2, zero_token=False)
    untied = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 6})).eval()
    untied.model.embed_tokens, untied.model.norm = net.model.embed_tokens, net.model.norm
    untied.lm_head = copy.deepcopy(net.lm_head)
    for place, layer in enumerate([0, 1, 2, 1, 2, 3]):
        untied.model.layers[place].load_state_dict(net.model.layers[layer].state_dict())
    untied(ids, labels=ids).loss.backward()
    net(ids, labels=ids).loss.backward()
    ours = net.model.layers[1].mlp.up_proj.weight.grad
    theirs = [untied.model.layers[place].mlp.up_proj.weight.grad for place in (1, 3)]
    torch.testing.assert_close(ours, theirs[0] + theirs[1], rtol=1e-4, atol=1e-6)


def test_zero_keys_of_cycles_that_ran_have_gradients_and_others_have_none(ids):
    net = model(num_cycles=3).train()
    net(ids, labels=ids, num_cycles=2).loss.backward()
    sizes = net.model.zero_token.bias_k.grad.abs().amax((2, 3))
    assert (sizes[:2] > 0).all()
    assert (sizes[2] == 0).all()


def test_the_zero_tokens_value_is_no_parameter():
    names = set(extra_shapes(vars(ZTTConfig(**SMALL))))
    assert names == {"model.zero_token.bias_k", "model.zero_token.bias_z"}
    plain = dict(model(zero_token=False).named_parameters())
    assert set(dict(model().named_parameters())) == set(plain) | names


def test_gradient_checkpointing_changes_no_gradient(ids, left_padded):
    grads = []
    for checkpointing in (False, True):
        net = model(num_cycles=2, cycle_gate="zero_init").train()
        if checkpointing:
            net.activation_checkpointing_enable()
        net(ids, attention_mask=left_padded, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"exit_kv": "copy"}], ids=str)
def test_mixed_precision_trains_as_float32_does_but_for_rounding(ids, left_padded, options, cached):
    found = []
    for mixed in (False, True):
        net = model(num_cycles=2, **options).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = net(ids, attention_mask=left_padded, labels=ids, use_cache=cached)
        out.loss.backward()
        found.append((out.loss, torch.cat([parameter.grad.flatten() for parameter in net.parameters()])))
    (loss, gradient), (mixed_loss, mixed_gradient) = found
    torch.testing.assert_close(mixed_loss, loss, rtol=2e-2, atol=0)
    assert torch.cosine_similarity(gradient, mixed_gradient, dim=0) > 0.98


# --- cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_changes_nothing(ids, left_padded, cycles, backend, kind):
    net = model(num_cycles=cycles, attn_implementation=backend)
    cache = DynamicCache(config=net.config)
    if kind == "static":
        cache = StaticCache(config=net.config, max_cache_len=12)
    whole = net(ids, attention_mask=left_padded).logits
    close(stepwise(net, ids, cache, left_padded), whole, left_padded)
    assert len(cache.layers) == net.config.num_hidden_layers == 2 + 2 * cycles
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {7}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("threshold", [None, -1.0, 0.2])
@pytest.mark.parametrize("kinds", [None, ["full_attention", "sliding_attention"] * 2])
def test_generate_takes_a_cache_of_fixed_length(ids, left_padded, threshold, kinds, backend):
    net = model(
        num_cycles=3,
        physical_layer_types=kinds,
        sliding_window=3 if kinds else None,
        attn_implementation=backend,
    )
    options = {"max_new_tokens": 6, "do_sample": False, "exit_threshold": threshold}
    found = [
        net.generate(ids, attention_mask=left_padded, cache_implementation=kind, **options)
        for kind in ("dynamic", "static")
    ]
    assert torch.equal(*found)


def test_padding_is_known_by_the_masks_of_a_cache_of_fixed_length(left_padded):
    net, tokens = model(num_cycles=2), left_padded.shape[1]
    for make in (lambda mask: mask, lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -1e30)):
        sees = torch.ones(tokens, tokens + 5, dtype=torch.bool).tril() & torch.cat(
            [left_padded.bool(), torch.ones(len(left_padded), 5, dtype=torch.bool)], dim=1
        ).unsqueeze(1)
        found = real_tokens({"full_attention": make(sees[:, None])}, tokens, 0)
        assert torch.equal(found, left_padded.bool())
    assert net.config.layer_types == ["full_attention"] * net.config.num_hidden_layers


@torch.no_grad()
def test_a_prompt_may_come_in_chunks(ids):
    net = model(num_cycles=2)
    found = stepwise(net, ids, DynamicCache(config=net.config), cuts=(2, 5, 7))
    close(found, net(ids).logits)


@torch.no_grad()
def test_a_sliding_window_counts_in_every_cycle(ids):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    options = {"physical_layer_types": kinds, "sliding_window": 3, "num_cycles": 2}
    net = model(**options)
    assert net.config.layer_types == [kinds[layer] for layer in (0, 1, 2, 1, 2, 3)]
    close(stepwise(net, ids, DynamicCache(config=net.config)), net(ids).logits)
    assert (net(ids).logits - model(num_cycles=2)(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_beams_and_assisted_decoding_give_what_they_give_without_a_cache(ids):
    net = model(num_cycles=2)
    options = {"max_new_tokens": 5, "do_sample": False}
    beams = [net.generate(ids, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)
    helped = net.generate(ids[:1], assistant_model=model(seed=3, num_cycles=1), **options)
    assert torch.equal(helped, net.generate(ids[:1], **options))  # candidates turned down are cut off again


@torch.no_grad()
def test_generate_takes_cycles_for_each_call(ids, left_padded):
    net = model(num_cycles=3)
    given = {"attention_mask": left_padded, "max_new_tokens": 5, "do_sample": False}
    fewer = net.generate(ids, num_cycles=1, **given)
    wanted = ids
    mask = left_padded
    for _ in range(5):
        step = net(wanted, attention_mask=mask, num_cycles=1).logits[:, -1].argmax(-1, keepdim=True)
        wanted, mask = torch.cat([wanted, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
    assert torch.equal(fewer, wanted)
    assert not torch.equal(fewer, net.generate(ids, **given))


@torch.no_grad()
def test_more_cycles_than_trained_take_the_last_ones_tokens_again(ids):
    net = model(num_cycles=2)
    with pytest.raises(InputError, match="num_cycles: 3 asked, 2 trained"):
        net(ids, num_cycles=3)
    more = net(ids, num_cycles=3, allow_extrapolation=True).logits
    close(more, resize_cycles(net, 3)(ids).logits)
    cached = stepwise(net, ids, new_cache(net.config, 3), num_cycles=3, allow_extrapolation=True)
    close(cached, more)
    with pytest.raises(InputError, match="past_key_values: 6 places, 3 cycles need 8"):
        net(ids, num_cycles=3, allow_extrapolation=True, past_key_values=DynamicCache(config=net.config))


@pytest.mark.parametrize(
    ("kind", "policy"), [(None, "propagate"), ("static", "propagate"), (None, "share"), (None, "copy")]
)
@torch.no_grad()
def test_generate_makes_a_cache_for_more_cycles_than_trained(ids, left_padded, kind, policy):
    net = model(num_cycles=2, exit_kv=policy)
    given = {"attention_mask": left_padded, "max_new_tokens": 5, "do_sample": False}
    more = {"num_cycles": 4, "allow_extrapolation": True}
    found = net.generate(ids, cache_implementation=kind, **more, **given)
    assert torch.equal(found, resize_cycles(net, 4).generate(ids, **given))
    assert net.config.num_cycles == 2
    with pytest.raises(InputError, match="num_cycles: 4 asked, 2 trained"):
        net.generate(ids, num_cycles=4, **given)


@torch.no_grad()
def test_a_cache_does_not_take_more_cycles_than_it_holds(ids):
    net = model(num_cycles=3)
    cache = DynamicCache(config=net.config)
    net(ids, num_cycles=2, past_key_values=cache)
    with pytest.raises(InputError, match="3 asked, but the cache holds keys of 2 cycles"):
        net(ids[:, :1], past_key_values=cache)
    net(ids[:, :1], num_cycles=1, past_key_values=cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == [8, 8, 8, 8, 8, 0, 0, 8]


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(ids):
    net = model(num_cycles=2)
    alone = net(ids).logits
    pad = torch.zeros(2, 3, dtype=torch.long)
    ones = torch.ones_like(ids)
    left = net(torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, ones], 1)).logits
    right = net(torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, pad], 1)).logits
    close(left[:, 3:], alone)
    close(right[:, :7], alone)


# --- early exit -----------------------------------------------------------------------------------------


def middle_signal(net, ids, mask=None):
    """A threshold that some tokens pass after the first cycle and others don't, far from the signal of any:
    passes that round otherwise decide alike.
    """
    out = net(ids, attention_mask=mask, output_zero_attention=True)
    signals = out.zero_attention[0].mean(0).flatten().sort().values
    quarter = len(signals) // 4
    at = quarter + int(signals.diff()[quarter:-quarter].argmax())
    return float(signals[at : at + 2].mean())


@pytest.mark.parametrize("level", ["batch", "sequence", "token"])
@torch.no_grad()
def test_a_threshold_out_of_reach_runs_all_cycles(ids, level):
    net = model(num_cycles=3)
    out = net(ids, exit_threshold=1.0, exit_level=level)
    assert (out.num_cycles_used == 3).all()
    assert torch.equal(out.logits, net(ids).logits)


@pytest.mark.parametrize("level", ["batch", "sequence", "token"])
@pytest.mark.parametrize("least", [1, 2])
@torch.no_grad()
def test_a_threshold_below_all_runs_the_least_cycles(ids, level, least):
    net = model(num_cycles=3, min_cycles=least)
    out = net(ids, exit_threshold=-1.0, exit_level=level)
    assert (out.num_cycles_used == least).all()
    close(out.logits, net(ids, num_cycles=least).logits)


@pytest.mark.parametrize("criterion", ["zero_attention", "latent_diff", "entropy", "kl"])
@torch.no_grad()
def test_a_stricter_threshold_never_takes_fewer_cycles(ids, criterion):
    net = model(num_cycles=3, exit_criterion=criterion)
    signal = net(ids, output_exit_signal=True).exit_signal
    assert signal.shape == (3, 2, 7)
    assert signal.isfinite().all()
    cuts = signal[0].flatten().sort().values
    if criterion != "zero_attention":
        cuts = cuts.flip(0)
    used = [net(ids, exit_threshold=float(cut), exit_level="token").num_cycles_used[:, 0] for cut in cuts]
    for fewer, more in itertools.pairwise(used):
        assert (more >= fewer).all()
    assert (used[-1] > used[0]).any()


@torch.no_grad()
def test_a_row_leaves_without_regard_to_other_rows(ids, left_padded):
    net = model(num_cycles=3)
    shares = net(ids, attention_mask=left_padded, output_zero_attention=True).zero_attention[0].mean(0)
    least = torch.stack([shares[0, 3:].min(), shares[1].min()])
    options = {"exit_threshold": float(least.mean()), "exit_level": "sequence"}
    both = net(ids, attention_mask=left_padded, **options)
    assert both.num_cycles_used.tolist() in ([1, 3], [3, 1])
    for row in range(2):
        alone = net(ids[row : row + 1], attention_mask=left_padded[row : row + 1], **options)
        assert alone.num_cycles_used[0] == both.num_cycles_used[row]
        close(both.logits[row : row + 1], alone.logits, left_padded[row : row + 1])


@torch.no_grad()
def test_padding_holds_nobody_back(ids):
    net, right = model(num_cycles=2), torch.ones_like(ids)
    right[:, 4:] = 0
    shares = net(ids[:, :4], output_zero_attention=True).zero_attention[0].mean(0)
    options = {"exit_threshold": float(shares.min()) - 1e-4, "exit_level": "batch"}
    assert (net(ids, attention_mask=right, **options).num_cycles_used == 1).all()


@pytest.mark.parametrize("policy", ["propagate", "copy"])
@torch.no_grad()
def test_a_later_token_never_changes_earlier_ones(ids, policy):
    net = model(num_cycles=3, exit_kv=policy)
    options = {"exit_threshold": middle_signal(net, ids), "exit_level": "token"}
    one = net(ids, **options)
    assert len(one.num_cycles_used.unique()) > 1
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 37 + 3
    other = net(changed, **options)
    close(one.logits[:, :5], other.logits[:, :5])
    assert torch.equal(one.num_cycles_used[:, :5], other.num_cycles_used[:, :5])


@pytest.mark.parametrize("policy", ["propagate", "copy"])
@torch.no_grad()
def test_tokens_that_leave_one_by_one_leave_the_same_with_a_cache(ids, left_padded, policy):
    """Token by token through a cache, rows leaving at different cycles, against one pass without."""
    net = model(num_cycles=3, exit_kv=policy)
    options = {"exit_threshold": middle_signal(net, ids, left_padded), "exit_level": "token"}
    whole = net(ids, attention_mask=left_padded, use_cache=True, **options)
    used = whole.num_cycles_used
    without = net(ids, attention_mask=left_padded, use_cache=False, **options)
    assert without.past_key_values is None
    assert torch.equal(without.num_cycles_used, used)
    close(without.logits, whole.logits, left_padded)
    assert any(len(column.unique()) > 1 for column in used[:, 3:].T)
    cache = DynamicCache(config=net.config)
    found = stepwise(net, ids, cache, left_padded, cuts=range(1, 8), **options)
    close(found, whole.logits, left_padded)
    assert {layer.get_seq_length() for layer in cache.layers} == {7}
    for place, other in zip(cache.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(place.keys[1], other.keys[1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_keys_of_skipped_cycles_are_those_of_the_state_that_left(ids):
    net = model(num_cycles=3)
    out = net(ids, exit_threshold=-1.0, use_cache=True, output_hidden_states=True)
    left = out.hidden_states[3]  # after head and one cycle of two layers
    layer = net.model.layers[1]
    positions = net.model.rotary_emb(left, torch.arange(7)[None])
    keys, values = layer.self_attn.keys_and_values(layer.input_layernorm(left), positions)
    for cycle in (1, 2):
        place = out.past_key_values.layers[net.config.slot(1, cycle)]
        torch.testing.assert_close((place.keys, place.values), (keys, values))
    net.config.exit_kv = "copy"
    copied = net(ids, exit_threshold=-1.0, use_cache=True).past_key_values
    first = copied.layers[net.config.slot(1, 0)].keys
    assert all(torch.equal(copied.layers[net.config.slot(1, cycle)].keys, first) for cycle in (1, 2))


@torch.no_grad()
def test_without_keys_for_skipped_cycles_the_prompt_decides_for_all(ids):
    net = model(num_cycles=3, exit_kv="none", exit_level="batch")
    cache = DynamicCache(config=net.config)
    found = stepwise(net, ids, cache, exit_threshold=-1.0)
    close(found, net(ids, num_cycles=1).logits)
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 7, 0, 0, 0, 0, 7]
    with pytest.raises(InputError, match="exit_kv none needs exit_level batch, found token"):
        net(ids, exit_level="token")


@torch.no_grad()
def test_shared_places_hold_the_last_cycle(ids, monkeypatch):
    told = []
    monkeypatch.setattr(passes.logger, "warning_once", told.append)
    net = model(num_cycles=2, exit_kv="share")
    assert net.config.num_hidden_layers == 4
    net(ids, use_cache=False)
    assert not told
    shared = net(ids, use_cache=True).past_key_values
    assert "their results differ, and training is without" in told[0]
    split = model(num_cycles=2)
    full = split(ids, use_cache=True).past_key_values
    for layer in range(4):
        last = full.layers[split.config.slot(layer, 1)]
        torch.testing.assert_close(shared.layers[layer].keys, last.keys)
    assert net.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 7
    with pytest.raises(InputError, match="share needs a cache that can be cut back, found StaticLayer"):
        net(ids, past_key_values=StaticCache(config=net.config, max_cache_len=12))


def test_deep_supervision_adds_the_mean_loss_of_fewer_cycles(ids):
    net = model(num_cycles=3, num_tail_layers=1, cycle_gate="zero_init").train()
    net.model.cycle_gate.bias.data.fill_(0.5)
    plain = [net(ids, labels=ids, num_cycles=cycles).loss for cycles in (1, 2, 3)]
    net.config.deep_supervision = 0.3
    found = net(ids, labels=ids).loss
    torch.testing.assert_close(found, plain[2] + 0.3 * (plain[0] + plain[1]) / 2)
    wanted = torch.autograd.grad(plain[2] + 0.3 * (plain[0] + plain[1]) / 2, list(net.parameters()))
    for got, want in zip(torch.autograd.grad(found, list(net.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(ids, labels=ids, num_cycles=1).loss, plain[0])
    torch.testing.assert_close(net.eval()(ids, labels=ids).loss, plain[2])
    with pytest.raises(InputError, match="past_key_values: given, but earlier cycles' states"):
        net.train()(ids, labels=ids, past_key_values=DynamicCache(config=net.config))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_read_again_are_the_middle_and_what_supervises_it(tied):
    net = model(num_cycles=3, tie_word_embeddings=tied)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    each = [sum(size for name, size in sizes.items() if f"layers.{layer}." in name) for layer in range(4)]
    assert repeated_parameters(net.config.to_dict(), sizes) == 2 * (each[1] + each[2])
    supervised = {**net.config.to_dict(), "deep_supervision": 0.5}
    assert repeated_parameters(supervised, sizes) == 2 * (sum(each[1:]) + 40 * 32)


def test_training_never_leaves_early(ids):
    net = model(num_cycles=2, exit_threshold=-1.0)
    assert (net(ids).num_cycles_used == 1).all()
    assert (net.train()(ids).num_cycles_used == 2).all()


# --- what it saves and what it refuses ------------------------------------------------------------------


BASIC = {"zero_token": False, "num_head_layers": 0, "num_tail_layers": 0}


@pytest.mark.parametrize("options", [{}, BASIC, {"cycle_gate": "zero_init"}], ids=str)
def test_saved_twice_it_is_the_same_and_loads_with_the_auto_classes(tmp_path, ids, options):
    net, folder = model(num_cycles=3, **options), tmp_path / "first"
    net.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert isinstance(last, ZTTForCausalLM)
    assert (last.config.num_hidden_layers, last.config.num_physical_layers) == (
        net.config.num_hidden_layers,
        4,
    )
    configs = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("first", "second")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(last(ids).logits, net(ids).logits)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = sum(4 * parameter.numel() for parameter in net.parameters())
    assert stored < weights + 20_000  # shared layers once


def test_tied_embeddings_stay_tied(tmp_path):
    model(tie_word_embeddings=True).save_pretrained(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_zero_tokens_of_another_shape_are_refused_with_both_shapes(tmp_path):
    model(num_cycles=2).save_pretrained(tmp_path)
    config = ZTTConfig.from_dict({**AutoConfig.from_pretrained(tmp_path).to_dict(), "num_cycles": 3})
    with pytest.raises(CheckpointError, match=r"\(2, 2, 2, 8\), the config needs \(3, 2, 2, 8\)"):
        ZTTForCausalLM.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("options", [{"subfolder": "inner"}, {"variant": "half"}], ids=str)
def test_it_loads_from_where_transformers_finds_it(tmp_path, ids, options):
    net = model(num_cycles=2)
    net.save_pretrained(tmp_path / options.get("subfolder", ""), variant=options.get("variant"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, net(ids).logits)


def test_zero_tokens_in_a_subfolder_are_compared_too(tmp_path):
    model(num_cycles=2).save_pretrained(tmp_path / "inner")
    config = ZTTConfig(**SMALL, num_cycles=3)
    with pytest.raises(CheckpointError, match=r"inner: .*, the config needs \(3, 2, 2, 8\)"):
        ZTTForCausalLM.from_pretrained(tmp_path, config=config, subfolder="inner")


@torch.no_grad()
def test_resized_cycles_begin_where_the_last_one_was(ids):
    net = model(num_cycles=2, cycle_gate="zero_init")
    net.model.cycle_gate.bias.fill_(0.5)
    more = resize_cycles(net, 4)
    assert more.config.num_hidden_layers == 10
    close(more(ids).logits, net(ids).logits)  # new gates are closed
    close(resize_cycles(more, 2)(ids).logits, net(ids).logits)
    close(resize_cycles(net, 1)(ids).logits, net(ids, num_cycles=1).logits)
    assert torch.equal(more.model.zero_token.bias_k[3], net.model.zero_token.bias_k[1])


def test_a_fixed_number_of_cycles_compiles_to_one_graph(ids):
    net = model(num_cycles=3, training_cycles="grow")
    whole = torch.compile(net, backend="eager", fullgraph=True)
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            close(whole(ids).logits, net(ids).logits)
            close(whole(ids, num_cycles=2).logits, net(ids, num_cycles=2).logits)
    net.train()
    close(whole(ids).logits, net(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cycles": 0}, "num_cycles: expected a whole number of at least 1, found 0"),
        ({"num_head_layers": 2, "num_tail_layers": 2}, "4 of 4 layers leave no middle.*at most 3"),
        ({"num_head_layers": -1}, "num_head_layers: expected at least 0"),
        ({"min_cycles": 3}, "min_cycles: 3 is more than num_cycles, 2"),
        ({"deep_supervision": -0.5}, "deep_supervision: expected a number from 0 on, found -0.5"),
        ({"gate": "layers"}, "gate: expected layer, attn, none, found 'layers'; did you mean `layer`"),
        ({"exit_level": "row"}, "exit_level: expected batch, sequence, token, found 'row'"),
        ({"exit_criterion": "zeta"}, "exit_criterion: expected zero_attention, latent_diff, entropy, kl"),
        ({"exit_kv": "none"}, "exit_kv: none needs `exit_level: batch`"),
        ({"zero_token": False, "exit_threshold": 0.5}, "zero_attention needs zero tokens"),
        ({"exit_threshold": "0.5"}, "exit_threshold: expected a finite number or nothing, found '0.5'"),
        ({"exit_threshold": float("nan")}, "exit_threshold: expected a finite number or nothing, found nan"),
        ({"zero_token_impl": "fast"}, "zero_token_impl: expected auto, lse, concat, found 'fast'"),
        ({"physical_layer_types": ["full_attention"]}, "physical_layer_types: 1 of 4 layers"),
        ({"zero_token": False, "gate": "attn"}, "gate: 'attn' has no effect, since `zero_token` is false"),
        ({"zero_token": False, "zero_query": "pre_rope"}, "zero_query: 'pre_rope' has no effect"),
        ({"zero_token": False, "zero_bias_init": 0.0}, "zero_bias_init: 0.0 has no effect"),
        ({"zero_bias": False, "zero_bias_init": -6.0}, "zero_bias_init: -6.0 has no effect, .*`zero_bias`"),
        ({"num_cycles": 1, "deep_supervision": 0.3}, "deep_supervision: 0.3 has no effect, .*num_cycles` is"),
        ({"num_cycles": 1, "cycle_gate": "zero_init"}, "cycle_gate: 'zero_init' has no effect"),
        ({"num_cycles": 1, "training_cycles": "grow"}, "training_cycles: 'grow' has no effect"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_says_why(options, message):
    with pytest.raises(InputError, match=message):
        ZTTConfig(**{**SMALL, **options})


def test_calls_that_ask_for_what_is_not_there_say_so(ids):
    net = model(num_cycles=2)
    for options, message in (
        ({"num_cycles": 0}, "num_cycles: expected a whole number of at least 1, found 0"),
        ({"num_cycles": 1.5}, "num_cycles: expected a whole number of at least 1, found 1.5"),
        ({"exit_threshold": "0.5"}, "exit_threshold: expected a finite number or nothing, found '0.5'"),
        ({"exit_threshold": float("nan")}, "exit_threshold: .*, found nan"),
        ({"exit_level": "row"}, "exit_level: expected batch, sequence, token, found 'row'"),
        ({"output_attentions": True}, "output_attentions: needs attn_implementation eager, found sdpa"),
    ):
        with pytest.raises(InputError, match=message):
            net(ids, **options)
    for options in ({"exit_threshold": 0.5}, {"output_exit_signal": True}):
        with pytest.raises(InputError, match="the model has no zero tokens; set exit_criterion"):
            model(zero_token=False)(ids, **options)
        for criterion in ("entropy", "kl"):
            inner = model(exit_criterion=criterion).model
            with pytest.raises(InputError, match=f"{criterion} reads predictions, which a ZTTModel does not"):
                inner(ids, **options)
            assert inner.train()(ids, exit_threshold=0.5).num_cycles_used.tolist() == [2, 2]
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        net.model()
    with pytest.raises(ValueError, match="cycels"):
        net.generate(ids, cycels=2)


def test_outputs_carry_the_fields_of_both_kinds():
    net = model()
    found = net(torch.tensor([[3, 4]]), output_zero_attention=True, output_exit_signal=True)
    names = {field.name for field in dataclasses.fields(found)}
    assert {"logits", "past_key_values", "zero_attention", "num_cycles_used", "exit_signal"} <= names
    assert found.exit_signal.shape == (2, 1, 2)
