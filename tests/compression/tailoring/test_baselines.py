"""Rules that take layers out of one model, against loops written from their definitions."""

import math

import pytest
import torch
from torch import nn

from weightsmith.compression import angular_block, block_influence, greedy, laco, shortgpt
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError

from .made import KINDS, gpt2, ids, llama, logits

BATCHES = [ids(3, 10, seed=1), ids(2, 7, seed=2)]


def streams(model, batch):
    """Inputs of all layers and the output of the last, before the final norm."""
    found = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].double())) for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, out: found.append(out.double())))
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    return found


def cosine(one, other):
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


def test_block_influence_is_one_less_the_mean_cosine_over_tokens():
    model = llama(depth=5)
    turns = [[] for _ in range(5)]
    for batch in BATCHES:
        hidden = streams(model, batch)
        for layer in range(5):
            turns[layer].append(1 - cosine(hidden[layer], hidden[layer + 1]).flatten())
    expected = [float(torch.cat(values).mean()) for values in turns]
    assert block_influence(model, BATCHES) == pytest.approx(expected, rel=1e-5)
    order = sorted(range(5), key=lambda layer: expected[layer])
    assert shortgpt(model, BATCHES, 2).dropped == tuple(sorted(order[:2]))


def test_the_block_of_least_angle_goes():
    model = llama(depth=6)
    totals = [0.0] * 5
    for batch in BATCHES:
        hidden = streams(model, batch)
        for begin in range(5):
            angle = torch.arccos(cosine(hidden[begin][:, -1], hidden[begin + 2][:, -1])) / math.pi
            totals[begin] += float(angle.sum())
    begin = totals.index(min(totals))
    assert angular_block(model, BATCHES, 2).dropped == (begin, begin + 1)


def nats(model):
    total = count = 0
    for batch in BATCHES:
        logs = logits(model, batch)[:, :-1].log_softmax(-1)
        total -= float(logs.gather(2, batch[:, 1:, None]).double().sum())
        count += batch[:, 1:].numel()
    return total / count


def test_greedy_takes_the_layer_that_is_missed_least_each_time():
    model = llama(depth=5)
    pool, gone = LayerPool(model), []
    for _ in range(2):
        left = [layer for layer in range(5) if layer not in gone]
        gone.append(min(left, key=lambda layer: nats(pool.build(Configuration.of(5, [*gone, layer])))))
    assert greedy(model, BATCHES, 2).dropped == tuple(sorted(gone))


@pytest.mark.parametrize("kind", KINDS)
def test_rules_leave_the_model_as_it_was(kind):
    model = KINDS[kind]()
    expected = logits(model)
    for rule in (shortgpt, angular_block, greedy):
        assert len(rule(model, BATCHES, 1).dropped) == 1
    laco(model, BATCHES, 1, num_merged=1)
    assert torch.equal(logits(model), expected)
    numbers = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    assert numbers == sorted(numbers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_collapse_adds_the_differences_of_the_layers_above():
    model = llama(depth=6)
    made = laco(model, BATCHES, 2, num_merged=2, threshold=-1.0)
    # With no threshold the highest place takes one layer, and the next one, two places lower, the other.
    assert made.groups == ((0,), (1,), (2, 3), (4, 5))
    layers = model.model.layers
    for place, group in enumerate(made.groups):
        for name, value in made.model.model.layers[place].named_parameters():
            start = layers[group[0]].get_parameter(name)
            others = [layers[number].get_parameter(name) - start for number in group[1:]]
            torch.testing.assert_close(value, start + sum(others))
    assert made.model.config.num_hidden_layers == 4
    assert model.config.num_hidden_layers == 6


def test_a_layer_that_is_a_sum_is_added_as_the_sum_that_it_is():
    model = llama(depth=7)
    made = laco(model, BATCHES, 4, num_merged=2, threshold=-1.0)
    # The highest place takes one layer; two places lower, layer 3 takes layer 4 and that place.
    assert made.groups == ((0,), (1, 2), (3, 4, 5, 6))
    layers = model.model.layers
    for name, value in made.model.model.layers[2].named_parameters():
        start, first, second = (layers[number].get_parameter(name) for number in (3, 4, 5))
        folded = second + (layers[6].get_parameter(name) - second)
        torch.testing.assert_close(value, start + (first - start) + (folded - start))


def test_a_collapse_shares_nothing_with_the_model_it_was_made_from():
    model = llama(depth=5)
    expected = logits(model)
    made = laco(model, BATCHES, 1, num_merged=1).model
    ours = {value.data_ptr() for value in model.parameters()}
    assert not any(value.data_ptr() in ours for value in made.parameters())
    for one, depth in ((model, 5), (made, 4)):
        assert {layer.self_attn.config.num_hidden_layers for layer in one.model.layers} == {depth}
    with torch.no_grad():
        for value in made.parameters():
            value.zero_()
    assert torch.equal(logits(model), expected)


def test_a_collapse_that_changes_the_output_too_much_is_not_made_until_the_threshold_falls():
    model = llama(depth=5)
    strict = laco(model, BATCHES, 1, threshold=0.9999, step=0.1)
    assert strict.threshold < 0.9999
    assert len(strict.groups) == 4
    cosines = torch.cat([cosine(_last(model, b), _last(strict.model, b)).flatten() for b in BATCHES])
    assert float(cosines.mean()) > strict.threshold


def _last(model, batch):
    return streams(model, batch)[-1]


def test_identical_layers_collapse_to_one_of_them():
    model = llama(depth=4)
    model.model.layers[3].load_state_dict(model.model.layers[2].state_dict())
    made = laco(model, BATCHES, 1, threshold=-1.0)
    assert made.groups[-1] == (2, 3)
    for name, value in made.model.model.layers[2].named_parameters():
        assert torch.equal(value, model.model.layers[2].get_parameter(name))


def test_wrong_numbers_and_no_data_are_refused():
    model = llama()
    with pytest.raises(InputError, match="no batches"):
        block_influence(model, [])
    with pytest.raises(InputError, match="no batches"):
        greedy(model, [], 1)
    for rule in (shortgpt, angular_block, greedy):
        for number in (4, -1):
            with pytest.raises(InputError, match=rf"{number} of 4 layers to drop, expected 0\.\.3"):
                rule(model, BATCHES, number)
    with pytest.raises(InputError, match=r"expected 0\.\.3"):
        laco(model, BATCHES, 4)
    with pytest.raises(InputError, match="can't be collapsed"):
        laco(model, BATCHES, 3, lowest=2)


def test_layers_that_are_transposed_are_layers_too():
    model = gpt2()
    assert isinstance(model.transformer.h, nn.ModuleList)
    assert len(shortgpt(model, BATCHES, 2).kept) == 2
