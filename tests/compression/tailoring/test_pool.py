"""Models put together from resident layers are, bit for bit, what a hand would build."""

import copy
import logging

import pytest
import torch
from torch import nn

from weightsmith.compression.tailoring.layers import kept_config, stack_path
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import CheckpointError, InputError

from .made import KINDS, family, gemma, gpt2, ids, llama, logits, near


def equal_states(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def all_from(depth, *sources, weight=1.0):
    return Configuration.of(
        depth, [], dict.fromkeys(range(depth), sources), dict.fromkeys(range(depth), weight)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dropped_and_nothing_chosen_is_the_base(kind):
    base, candidates = family(kind)
    pool = LayerPool(base, candidates)
    assert equal_states(pool.build(all_from(pool.depth)), base)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_one_candidate_is_that_candidate(kind):
    base, candidates = family(kind)
    pool = LayerPool(base, candidates)
    assert equal_states(pool.build(all_from(pool.depth, 2)), candidates[1])
    torch.testing.assert_close(
        logits(pool.assemble(all_from(pool.depth, 2))), logits(candidates[1]), rtol=0, atol=0
    )


def test_a_weight_of_nought_is_the_base_and_half_of_two_is_their_mean():
    base, (one, other) = family()
    pool = LayerPool(base, [one, other])
    assert equal_states(pool.build(all_from(4, 1, 2, weight=0.0)), base)
    mean = pool.build(all_from(4, 1, 2, weight=0.5))
    for name, value in mean.named_parameters():
        expected = (one.get_parameter(name) + other.get_parameter(name)) / 2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_computes_what_a_list_of_the_same_layers_computes(kind):
    base, candidates = family(kind)
    depth = base.config.num_hidden_layers
    configuration = Configuration.of(depth, [1], {0: [1], 2: [2]})
    pool = LayerPool(base, candidates)
    by_hand = copy.deepcopy(base)
    path = stack_path(by_hand)
    models = [base, *candidates]
    chosen = [
        copy.deepcopy(models[layer.sources[0] if layer.sources else 0].get_submodule(path)[layer.layer])
        for layer in configuration.layers
    ]
    body = by_hand.get_submodule(path.rpartition(".")[0])
    setattr(body, path.rpartition(".")[2], nn.ModuleList(chosen))
    body.config.num_hidden_layers = depth - 1
    if kind == "gemma":
        body.config.layer_types = [base.config.layer_types[layer] for layer in configuration.kept]
    first = dict(candidates[0].named_parameters())  # the first kept layer is its, the last one the base's
    with torch.no_grad():
        for name, value in by_hand.named_parameters():
            if "wte" in name or "wpe" in name or "embed" in name:
                value.copy_(first[name])
    assert torch.equal(logits(pool.assemble(configuration)), logits(by_hand))
    assert torch.equal(logits(pool.build(configuration)), logits(by_hand))


def test_a_blend_after_a_dropped_layer_starts_from_its_own_layer_of_the_base():
    base, candidates = family()
    configuration = Configuration.of(4, [1], {2: [1, 2]}, {2: 0.6})
    name = "mlp.up_proj.weight"

    def layer(model, number):
        return model.model.layers[number].get_parameter(name)

    def expected(anchor):
        start = layer(base, anchor)
        return start + 0.6 * ((layer(candidates[0], 2) - start) + (layer(candidates[1], 2) - start))

    own = LayerPool(base, candidates).build(configuration)
    torch.testing.assert_close(layer(own, 1), expected(2), rtol=1e-6, atol=1e-7)
    repo = LayerPool(base, candidates, compat="repo").build(configuration)
    torch.testing.assert_close(layer(repo, 1), expected(1), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(layer(own, 1), layer(repo, 1), rtol=1e-2)


def test_the_shift_of_the_public_code_cancels_where_weights_sum_to_one():
    base, candidates = family()
    configuration = Configuration.of(4, [1], {2: [1, 2]}, {2: 0.5})
    own, repo = (LayerPool(base, candidates, compat=kind).build(configuration) for kind in ("own", "repo"))
    for name, value in own.named_parameters():
        torch.testing.assert_close(value, repo.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_tensors_outside_of_the_layers_follow_the_ends_or_what_is_asked():
    base, candidates = family()
    configuration = Configuration.of(4, [0], {1: [1], 3: [2]})

    def built(edge):
        return LayerPool(base, candidates, edge=edge).build(configuration)

    follow = built("follow")
    assert torch.equal(follow.model.embed_tokens.weight, candidates[0].model.embed_tokens.weight)
    assert torch.equal(follow.lm_head.weight, candidates[1].lm_head.weight)
    assert torch.equal(follow.model.norm.weight, candidates[1].model.norm.weight)
    assert torch.equal(built("base").lm_head.weight, base.lm_head.weight)
    mean = (candidates[0].lm_head.weight + candidates[1].lm_head.weight) / 2
    torch.testing.assert_close(built("mean").lm_head.weight, mean)


def test_a_tied_embedding_is_one_tensor_and_follows_the_first_layer():
    base = llama(tied=True)
    candidates = [near(base, 1), near(base, 2)]
    for candidate in candidates:
        candidate.tie_weights()
    pool = LayerPool(base, candidates)
    configuration = Configuration.of(4, [1], {0: [1], 3: [2]})
    for model in (pool.build(configuration), pool.assemble(configuration)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, candidates[0].model.embed_tokens.weight)
        assert torch.equal(model.model.norm.weight, candidates[1].model.norm.weight)


def test_choosing_and_dropping_copy_nothing_and_blends_are_computed_once():
    base, candidates = family()
    pool = LayerPool(base, candidates)
    model = pool.assemble(Configuration.of(4, [0], {1: [1]}))
    for placed, chosen in ((0, candidates[0].model.layers[1]), (2, base.model.layers[3])):
        pairs = zip(model.model.layers[placed].parameters(), chosen.parameters(), strict=True)
        assert all(ours is theirs for ours, theirs in pairs)
    assert pool.num_blended == 0
    blend = Configuration.of(4, [0], {2: [1, 2]}, {2: 0.3})
    first = pool.assemble(blend).model.layers[1]
    assert pool.assemble(blend).model.layers[1] is first
    assert pool.num_blended == 1


def test_the_cache_of_blends_keeps_to_its_bytes():
    base, candidates = family()
    layer = sum(value.nbytes for value in base.model.layers[0].parameters())
    pool = LayerPool(base, candidates, cache_bytes=2 * layer)
    blends = [Configuration.of(4, [], {place: [1, 2]}, {place: 0.3}) for place in (1, 2)]
    for configuration in (*blends, *blends):
        pool.assemble(configuration)
    assert pool.num_blended == 2
    small = LayerPool(base, candidates, cache_bytes=layer)
    for configuration in (*blends, *blends):
        small.assemble(configuration)
    assert small.num_blended == 4


def test_blends_of_bfloat16_are_made_in_float32_and_cast_once():
    base, candidates = family()
    low = [model.to(torch.bfloat16) for model in (base, *candidates)]
    pool = LayerPool(low[0], low[1:])
    configuration = all_from(4, 1, 2, weight=0.3)
    name = "model.layers.1.mlp.up_proj.weight"
    start, one, other = (model.get_parameter(name).float() for model in low)
    exact = start + 0.3 * ((one - start) + (other - start))
    assert torch.equal(pool.build(configuration).get_parameter(name), exact.to(torch.bfloat16))
    assert torch.equal(pool.build(configuration, torch.float32).get_parameter(name), exact)


def test_layers_are_numbered_anew_and_the_config_follows():
    base, candidates = family("gemma")
    pool = LayerPool(base, candidates)
    model = pool.build(Configuration.of(6, [0, 2], {4: [1]}))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    kinds = [base.config.layer_types[layer] for layer in (1, 3, 4, 5)]
    assert model.config.layer_types == kinds
    assert base.config.num_hidden_layers == 6


def test_a_built_model_shares_nothing_with_the_pool():
    base, candidates = family()
    before = copy.deepcopy(base.state_dict())
    model = LayerPool(base, candidates).build(Configuration.of(4, [1]))
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_generation_with_a_cache_is_that_without():
    for kind in KINDS:
        base, candidates = family(kind)
        depth = base.config.num_hidden_layers
        model = LayerPool(base, candidates).build(Configuration.of(depth, [0, 2], {1: [1]}))
        prompt = ids(1, 8)
        found = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        expected = prompt
        for _ in range(8):
            scores = logits(model, expected)[:, -1].clone()
            scores[:, model.config.eos_token_id] = -torch.inf  # as `min_new_tokens` has it
            expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, expected), kind


def test_a_config_with_lists_and_rules_by_layer_is_counted_anew():
    config = {
        "num_hidden_layers": 6,
        "layer_types": list("abcdef"),
        "mlp_only_layers": [1, 4],
        "decoder_sparse_step": 2,
        "first_k_dense_replace": 3,
        "max_window_layers": 4,
    }
    new = kept_config(config, [0, 2, 3, 4], 6)
    assert new["num_hidden_layers"] == 4
    assert new["layer_types"] == ["a", "c", "d", "e"]
    # Layers 1, 3 and 5 of the base are sparse, 1 is dense by name: of those kept only 3 is.
    assert (new["mlp_only_layers"], new["decoder_sparse_step"]) == ([0, 1, 3], 1)
    assert new["first_k_dense_replace"] == 2


@pytest.mark.parametrize(
    "key", ["scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "attn_layer_period"]
)
def test_a_rule_that_ties_layers_to_numbers_is_refused(key):
    with pytest.raises(InputError, match=key):
        kept_config({"num_hidden_layers": 3, key: 2}, [0, 2], 3)


def test_a_mixture_moves_as_a_whole_and_dense_layers_stay_dense():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    base = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_experts=4,
            shared_expert_intermediate_size=8, num_experts_per_tok=2, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, decoder_sparse_step=2, max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    candidate = near(base, 1)
    model = LayerPool(base, [candidate]).build(Configuration.of(4, [0], {1: [1]}))
    assert model.config.mlp_only_layers == [1]
    fresh = Qwen2MoeForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "candidate 1: hidden_size = 32, base has 16"),
        ({"intermediate_size": 32}, "intermediate_size = 32, base has 24"),
        ({"num_attention_heads": 4}, "num_attention_heads = 4, base has 2"),
        ({"vocab_size": 40}, "vocab_size = 40, base has 32"),
        ({"depth": 5}, "num_hidden_layers = 5, base has 4"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_both_values(changes, words):
    with pytest.raises(InputError, match=words):
        LayerPool(llama(), [llama(**changes)])


def test_another_architecture_is_refused():
    with pytest.raises(InputError, match="model_type = gpt2, base has llama"):
        LayerPool(llama(), [gpt2()])


def test_a_tensor_too_many_or_missing_is_named():
    biased = llama(attention_bias=True)
    with pytest.raises(
        InputError, match=r"candidate 1: has a tensor `model\.layers\.0\.self_attn\.q_proj\.bias`"
    ):
        LayerPool(llama(), [biased])
    with pytest.raises(
        InputError, match=r"candidate 1: has no tensor `model\.layers\.0\.self_attn\.q_proj\.bias`"
    ):
        LayerPool(biased, [llama()])


def test_models_of_other_types_are_refused():
    with pytest.raises(InputError, match="load all models alike"):
        LayerPool(llama(), [llama().to(torch.bfloat16)])


def test_quantised_models_are_refused():
    quantised = llama()
    quantised.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="is quantised"):
        LayerPool(llama(), [quantised])


def test_sharded_models_are_refused(shard):
    with pytest.raises(InputError, match=r"candidate 1: `model.embed_tokens.weight` is sharded .*; gather"):
        LayerPool(llama(), [shard(llama())])


def test_a_stranger_is_called_one(caplog):
    with caplog.at_level(logging.WARNING):
        LayerPool(llama(), [llama(seed=1)])
    assert "deltas larger than the base" in caplog.text
    caplog.clear()
    base, candidates = family()
    with caplog.at_level(logging.WARNING):
        LayerPool(base, candidates)
    assert not caplog.text


def test_strangers_are_told_where_biases_are_0(caplog):
    LayerPool(gpt2(), [gpt2(seed=1)])
    assert "deltas larger than the base" in caplog.text


def test_a_configuration_of_another_family_is_refused():
    base, candidates = family()
    pool = LayerPool(base, candidates)
    with pytest.raises(InputError, match="of 5 layers, base has 4"):
        pool.assemble(Configuration.of(5, [1]))
    with pytest.raises(InputError, match="source 3, there are 2"):
        pool.assemble(Configuration.of(4, [], {0: [3]}))


def test_a_model_without_layers_is_refused():
    model = gemma()
    del model.model.layers
    with pytest.raises(InputError, match="no list of 6 layers"):
        LayerPool(model)
