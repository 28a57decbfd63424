"""SparseSwaps: masks that no swap improves, limits in which they are known, one-shot pruning with them."""

import itertools

import pytest
import torch
from torch import nn

from weightsmith.compression.nm import (
    MaskProConfig,
    MaskProPruner,
    SparseSwapsOptions,
    WandaOptions,
    magnitude_scores,
    nm_mask,
    prune_,
    sparseswaps_mask,
    wanda_scores,
)
from weightsmith.errors import InputError


def layer(outputs=6, inputs=24, seed=0):
    """A weight and X Xᵀ of inputs that depend on each other."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=random) @ torch.randn(inputs, inputs, generator=random)
    return torch.randn(outputs, inputs, generator=random), x.T @ x


def errors(weight, hessian, mask):
    """d H dᵀ of each row, in float64."""
    gone = (weight * ~mask).double()
    return ((gone @ hessian.double()) * gone).sum(1)


def neighbours(mask, m):
    """Every mask of a row that is one swap within a group away."""
    for first in range(0, len(mask), m):
        kept = [first + j for j in range(m) if mask[first + j]]
        gone = [first + j for j in range(m) if not mask[first + j]]
        for u, p in itertools.product(kept, gone):
            other = mask.clone()
            other[u], other[p] = False, True
            yield other


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("block_size", [1, 9, 128])
def test_no_swap_is_left_that_helps_and_no_row_got_worse(n, m, block_size):
    weight, hessian = layer()
    first = nm_mask(magnitude_scores(weight), n, m)
    mask = sparseswaps_mask(weight, hessian, first, n, m, sweeps=100, block_size=block_size)
    assert mask.unflatten(1, (-1, m)).sum(-1).eq(n).all()
    before, after = errors(weight, hessian, first), errors(weight, hessian, mask)
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()
    for row, found in enumerate(mask):
        others = torch.stack(list(neighbours(found, m)))
        near = errors(weight[row].expand(len(others), -1), hessian, others)
        assert near.min() > after[row] * (1 - 1e-3)


def test_two_groups_often_end_at_the_best_mask_there_is():
    best = 0
    for seed in range(20):
        weight, hessian = layer(1, 8, seed)
        pairs = [torch.tensor([j in kept for j in range(4)]) for kept in itertools.combinations(range(4), 2)]
        every = torch.stack([torch.cat(both) for both in itertools.product(pairs, pairs)])
        least = errors(weight.expand(len(every), -1), hessian, every).min()
        mask = sparseswaps_mask(weight, hessian, nm_mask(magnitude_scores(weight)))
        best += bool(errors(weight, hessian, mask)[0] <= least * (1 + 1e-4))
    assert best >= 12


@pytest.mark.parametrize("init", ["magnitude", "wanda", "ria"])
def test_inputs_that_are_independent_leave_wandas_mask(init):
    """Without products between inputs a row's error is the sum of its weights' own: Wanda is exact."""
    weight, norms = layer()[0], torch.linspace(0.2, 3, 24)
    module = nn.Linear(24, 6, bias=False).eval()
    module.weight.data.copy_(weight)
    masks = prune_(module, [torch.diag(norms)], SparseSwapsOptions(init=init))
    assert torch.equal(masks["weight"].kept, nm_mask(wanda_scores(weight, norms)))
    assert torch.equal(module.weight, weight * masks["weight"].kept)


def test_one_sweep_is_less_than_many_and_an_end_is_an_end():
    weight, hessian = layer(64, 64)
    first = nm_mask(magnitude_scores(weight))
    totals = [float(errors(weight, hessian, first).sum())]
    for sweeps in (1, 100, 101):
        mask = sparseswaps_mask(weight, hessian, first, sweeps=sweeps)
        totals.append(float(errors(weight, hessian, mask).sum()))
    assert totals[0] > totals[1] > totals[2] == totals[3]
    assert torch.equal(sparseswaps_mask(weight, hessian, mask), mask)


def test_neither_a_factor_of_the_statistics_nor_weights_of_dead_inputs_matter():
    weight, hessian = layer()
    hessian[:, 4:8] = hessian[4:8] = 0
    first = nm_mask(magnitude_scores(weight))
    mask = sparseswaps_mask(weight, hessian, first)
    assert torch.equal(mask[:, 4:8], first[:, 4:8])
    weight[:, 4:8] *= 1e4
    assert torch.equal(sparseswaps_mask(weight, hessian * 1024, first), mask)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_decoders_come_nearer_to_their_dense_logits_than_by_wanda(build, tokens, architecture):
    dense = build(architecture)
    wanted = [dense(**batch).logits.detach() for batch in tokens]
    found = {}
    for options in (WandaOptions(), SparseSwapsOptions()):
        model = build(architecture)
        for name, mask in prune_(model, tokens, options).items():
            assert (model.get_parameter(name)[~mask.kept] == 0).all()
            assert torch.equal(model.get_parameter(name)[mask.kept], dense.get_parameter(name)[mask.kept])
        found[options.kind] = sum(
            float((model(**batch).logits.detach() - logits).square().mean())
            for batch, logits in zip(tokens, wanted, strict=True)
        )
    assert found["sparseswaps"] < found["wanda"]


def test_maskpro_begins_with_it(mlp, points):
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = MaskProConfig(init="sparseswaps", init_scale=30.0, lr=1e-9, steps=1)
    pruner = MaskProPruner(mlp, config, loss_fn=loss)
    pruner.fit(points)
    masks = prune_(mlp, [batch[0] for batch in points], SparseSwapsOptions())
    for name, mask in pruner.masks().items():
        assert torch.equal(mask.kept, masks[name].kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(6, 20, dtype=torch.bool)}, r"a mask of \[6, 20\]"),
        ({"hessian": torch.eye(20)}, r"statistics of \[20, 20\]"),
        ({"hessian": torch.full((24, 24), torch.nan)}, "q_proj: 576 of 576 statistics of its inputs are NaN"),
        ({"weight": torch.full((6, 24), torch.inf)}, "q_proj: 144 of 144 weights are NaN or infinite"),
        ({"m": 5}, r"24 inputs \(axis 1 of \[6, 24\]\) don't divide into groups of 5"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    weight, hessian = layer()
    given = {"weight": weight, "hessian": hessian, "mask": nm_mask(magnitude_scores(weight)), **change}
    with pytest.raises(InputError, match=message):
        sparseswaps_mask(**given, name="q_proj")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"init": "random"}, "init must be one of magnitude, wanda, ria, got 'random'"),
        ({"sweeps": 0}, "sweeps must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_are_said(option, message):
    with pytest.raises(InputError, match=message):
        SparseSwapsOptions(**option)
