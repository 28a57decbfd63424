"""Activations kept after the first layers change no bit and save layers."""

import copy

import pytest
import torch
from transformers import LlamaModel, OPTConfig, OPTForCausalLM

from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.prefix import PrefixCache
from weightsmith.compression.tailoring.space import Configuration

from .made import KINDS, TOKENS, family, ids, logits, near


def variants(depth):
    last = depth - 1
    return [
        Configuration.of(depth, [1], {0: [1], last: [2]}),
        Configuration.of(depth, [1], {0: [1], last: [1, 2]}, {last: 0.4}),
        Configuration.of(depth, [2], {0: [1], last: [2]}),
        Configuration.of(depth, [1], {0: [1], last: [2]}),
        Configuration.of(depth, [last], {0: [2]}),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_whole_pass(kind):
    base, candidates = family(kind, depth=6)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20)
    for configuration in variants(6):
        model = pool.assemble(configuration)
        expected = logits(model), logits(model, ids(3, 9, seed=1))
        with cache.reading(model, pool, configuration):
            assert torch.equal(logits(model), expected[0])
            assert torch.equal(logits(model, ids(3, 9, seed=1)), expected[1])
        assert torch.equal(logits(model), expected[0])
    assert cache.num_skipped > 0


def test_a_pass_starts_at_the_deepest_common_depth():
    base, candidates = family(depth=8)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20, cuts=3)
    first = Configuration.of(8, [])
    places = cache.places(8)
    assert places == [5, 3, 1]
    for configuration in (first, Configuration.of(8, [], {7: [1]}), Configuration.of(8, [], {4: [1]})):
        model = pool.assemble(configuration)
        with cache.reading(model, pool, configuration):
            logits(model)
    assert cache.num_skipped == 0 + 6 + 4
    assert cache.num_run == 8 + 2 + 4


def test_the_embedding_is_part_of_a_prefix():
    """It follows the first kept layer, so another source of it is another prefix."""
    base, candidates = family(depth=4)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20)
    for configuration in (Configuration.of(4, [0]), Configuration.of(4, [0], {1: [1]})):
        model = pool.assemble(configuration)
        with cache.reading(model, pool, configuration):
            logits(model)
    assert cache.num_skipped == 0


def test_what_stands_between_the_embedding_and_the_layers_follows_the_embedding():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=TOKENS, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=2,
        word_embed_proj_dim=8, max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    base = OPTForCausalLM(config).eval()
    pool, cache = LayerPool(base, [near(base, seed) for seed in (1, 2)]), PrefixCache(1 << 20)
    for configuration in variants(6):
        model = pool.assemble(configuration)
        expected = logits(model)
        with cache.reading(model, pool, configuration):
            assert torch.equal(logits(model), expected)
    assert cache.num_skipped > 0


class Started(LlamaModel):
    """Runs a matrix and adds a vector before its layers, under names that are nobody's custom."""

    def forward(self, input_ids=None, inputs_embeds=None, **rest):
        started = self.start(self.embed_tokens(input_ids)) + self.shift
        return super().forward(inputs_embeds=started, **rest)


@pytest.mark.parametrize("name", ["model.start.weight", "model.shift"])
def test_what_runs_before_the_layers_is_part_of_a_prefix_whatever_it_is_called(name):
    base, _ = family(depth=6)
    base.model.__class__ = Started
    base.model.start = torch.nn.Linear(16, 16, bias=False)
    base.model.shift = torch.nn.Parameter(torch.ones(16))
    candidates = [copy.deepcopy(base), copy.deepcopy(base)]
    with torch.no_grad():
        for number, candidate in enumerate(candidates, start=1):
            candidate.get_parameter(name).add_(0.1 * number)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20)
    for configuration in variants(6):
        model = pool.assemble(configuration)
        expected = logits(model)
        with cache.reading(model, pool, configuration):
            assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), expected)
    assert cache.num_skipped > 5 * 4  # the second pass of each, at the least


def test_few_bytes_keep_few_activations_and_none_keep_none():
    base, candidates = family(depth=8)
    one = ids().numel() * 16 * 4
    for size, skipped in ((0, 0), (one - 1, 0), (one, 6)):
        pool, cache = LayerPool(base, candidates), PrefixCache(size, cuts=3)
        for configuration in (Configuration.of(8, []), Configuration.of(8, [], {7: [1]})):
            model = pool.assemble(configuration)
            with cache.reading(model, pool, configuration):
                logits(model)
        # The deepest comes last and is what a single place holds.
        assert cache.num_skipped == skipped


def test_passes_that_fill_a_cache_of_keys_go_the_whole_way():
    base, candidates = family(depth=6)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20)
    configuration = Configuration.of(6, [1])
    model = pool.assemble(configuration)
    expected = model.generate(ids(1, 6), max_new_tokens=5, do_sample=False)
    with cache.reading(model, pool, configuration):
        logits(model, ids(1, 6))
        assert torch.equal(model.generate(ids(1, 6), max_new_tokens=5, do_sample=False), expected)
    assert cache.num_skipped == 0


def test_an_error_inside_a_pass_leaves_the_model_whole():
    base, candidates = family(depth=6)
    pool, cache = LayerPool(base, candidates), PrefixCache(1 << 20)
    configuration = Configuration.of(6, [1])
    model = pool.assemble(configuration)
    expected = logits(model)
    with cache.reading(model, pool, configuration):
        logits(model)
        hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    assert not any(layer._forward_hooks for layer in model.model.layers)
