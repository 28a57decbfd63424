"""One-shot pruning against reference implementations, and the walk through the blocks of real decoders."""

import warnings

import pytest
import torch
from torch import nn

from weightsmith.compression.nm import (
    MagnitudeOptions,
    MaskProConfig,
    RIAOptions,
    SparseGPTOptions,
    SparseSwapsOptions,
    WandaOptions,
    magnitude_scores,
    nm_mask,
    prune_,
    ria_scores,
    sparsegpt_prune,
    wanda_scores,
)
from weightsmith.compression.nm import calibrate as walking
from weightsmith.errors import InputError

ARCHITECTURES = ["llama", "gpt2", "opt", "gemma2", "gpt_neox"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wanda_by_loops(weight, norms, n, m):
    """The mask of Wanda, entry by entry."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(weight.shape[0]):
        for first in range(0, weight.shape[1], m):
            scores = [float(abs(weight[i, first + j]) * norms[first + j]) for j in range(m)]
            for j in sorted(range(m), key=lambda j: (-scores[j], j))[:n]:
                mask[i, first + j] = True
    return mask


def sparsegpt_by_columns(weight, hessian, n, m, block_size, damp=0.01):
    """SparseGPT as published, one column after another, in float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for begin in range(0, w.shape[1], block_size):
        end = min(begin + block_size, w.shape[1])
        block, errors = w[:, begin:end].clone(), torch.zeros(len(w), end - begin, dtype=torch.float64)
        local = u[begin:end, begin:end]
        for i in range(end - begin):
            if i % m == 0:
                scores = block[:, i : i + m] ** 2 / local.diagonal()[i : i + m] ** 2
                gone = scores.topk(m - n, dim=1, largest=False).indices
                mask[:, begin + i : begin + i + m].scatter_(1, gone, False)
            q = block[:, i] * mask[:, begin + i]
            error = (block[:, i] - q) / local[i, i]
            block[:, i:] -= error[:, None] * local[i, i:][None]
            block[:, i] = q
            errors[:, i] = error
        w[:, begin:end] = block
        w[:, end:] -= errors @ u[begin:end, end:]
    return w, mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 8)])
def test_wanda_is_the_reference_entry_by_entry(n, m):
    weight, norms = noise(5, 24), noise(24, seed=1).abs()
    assert torch.equal(nm_mask(wanda_scores(weight, norms), n, m), wanda_by_loops(weight, norms, n, m))


def test_wanda_of_even_inputs_is_magnitude():
    weight = noise(5, 24)
    assert torch.equal(
        nm_mask(wanda_scores(weight, torch.full((24,), 0.3))), nm_mask(magnitude_scores(weight))
    )


def test_ria_weighs_each_entry_by_its_row_and_column():
    weight, norms = noise(3, 8).double(), noise(8, seed=1).abs().double()
    expected = torch.empty(3, 8, dtype=torch.float64)
    for i in range(3):
        for j in range(8):
            size = abs(weight[i, j])
            expected[i, j] = (size / weight[:, j].abs().sum() + size / weight[i].abs().sum()) * norms[
                j
            ] ** 0.5
    torch.testing.assert_close(ria_scores(weight, norms).double(), expected, rtol=1e-5, atol=1e-6)
    assert ria_scores(torch.zeros(2, 4), torch.ones(4)).eq(0).all()


@pytest.mark.parametrize(
    ("n", "m", "block_size"), [(2, 4, 8), (2, 4, 16), (1, 4, 32), (4, 8, 16), (3, 8, 64)]
)
def test_sparsegpt_is_the_published_loop(n, m, block_size):
    weight, inputs = noise(6, 32), noise(100, 32, seed=1) @ noise(32, 32, seed=2)
    inputs[:, 5] = 0  # a dead input
    hessian = inputs.t() @ inputs
    expected, mask = sparsegpt_by_columns(weight, hessian, n, m, block_size)
    found = sparsegpt_prune(weight, hessian, n, m, block_size=block_size)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected.float(), rtol=1e-3, atol=1e-4)
    assert (found.mask.unflatten(1, (-1, m)).sum(2) == n).all()
    assert found.weight[~found.mask].eq(0).all()


@pytest.mark.parametrize(("pattern", "size"), [("3:6", 126), ("2:4", 128), ("1:3", 126)])
def test_the_blocks_of_sparsegpt_are_whole_groups_by_default(pattern, size):
    n, m = map(int, pattern.split(":"))
    weight, inputs = noise(4, 252), noise(300, 252, seed=1)
    squares = inputs.t() @ inputs
    found = sparsegpt_prune(weight, squares, n, m)
    assert torch.equal(found.weight, sparsegpt_prune(weight, squares, n, m, block_size=size).weight)
    model = nn.Sequential(nn.Linear(252, 4)).eval()
    masks = prune_(model, [inputs], SparseGPTOptions(pattern=pattern))
    assert masks["0.weight"].kept.sum() == 4 * 252 * n // m
    with pytest.raises(InputError, match=r"block_size must be a multiple of 3, got 128"):
        SparseGPTOptions(pattern="1:3", block_size=128)


def test_maskpro_begins_with_sparsegpt_for_groups_that_do_not_divide_its_block():
    from weightsmith.compression.nm import MaskProPruner

    layer, x = nn.Linear(12, 4).eval(), noise(30, 12)
    config = MaskProConfig(pattern="3:6", init="sparsegpt", steps=1)
    pruner = MaskProPruner(layer, config, loss_fn=lambda model, batch: model(batch).square().mean())
    pruner.fit([x])
    assert pruner.masks()["weight"].kept.sum() == 24


def test_sparsegpt_of_unrelated_even_inputs_is_magnitude():
    weight = noise(6, 32)
    found = sparsegpt_prune(weight, 3.0 * torch.eye(32))
    assert torch.equal(found.mask, nm_mask(weight.abs()))
    torch.testing.assert_close(found.weight, weight * found.mask)


def test_the_scale_of_the_statistics_does_not_matter_to_sparsegpt():
    weight, inputs = noise(6, 32), noise(100, 32, seed=1)
    first, other = (sparsegpt_prune(weight, factor * inputs.t() @ inputs) for factor in (1.0, 64.0))
    assert torch.equal(first.mask, other.mask)
    torch.testing.assert_close(first.weight, other.weight)


def test_sparsegpt_reconstructs_a_layer_better_than_wanda():
    weight, inputs = noise(16, 64), noise(300, 64, seed=1) @ noise(64, 64, seed=2)
    pruned = sparsegpt_prune(weight, inputs.t() @ inputs).weight
    wanda = weight * nm_mask(wanda_scores(weight, inputs.norm(dim=0)))
    exact = inputs @ weight.t()
    assert (inputs @ pruned.t() - exact).norm() < (inputs @ wanda.t() - exact).norm()


def test_sparsegpt_refuses_sizes_and_statistics_that_do_not_fit():
    weight = noise(4, 8)
    with pytest.raises(InputError, match="block_size must be a multiple of 4, got 6"):
        sparsegpt_prune(weight, torch.eye(8), block_size=6)
    with pytest.raises(InputError, match=r"statistics of \[4, 4\]"):
        sparsegpt_prune(weight, torch.eye(4))
    with pytest.raises(InputError, match="no positive matrix, even with damp"):
        sparsegpt_prune(weight, -torch.eye(8))
    squares = torch.eye(8)
    squares[3] = torch.inf
    with pytest.raises(InputError, match="q_proj: 8 of 64 statistics of its inputs are NaN or infinite"):
        sparsegpt_prune(weight, squares, name="q_proj")
    weight[2, 3] = torch.nan
    with pytest.raises(InputError, match="q_proj: 1 of 32 weights are NaN or infinite"):
        sparsegpt_prune(weight, torch.eye(8), name="q_proj")


def reference_wanda(model, batches, pattern=(2, 4)):
    """Wanda by whole passes of the model: for each block in order, norms with all earlier blocks pruned."""
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    for block in blocks:
        sums = {}
        layers = [part for part in block.modules() if hasattr(part, "weight") and part.weight.ndim == 2]

        def see(module, args, sums=sums):
            x = args[0].double()
            x = x.reshape(-1, x.shape[-1])[see.mask.reshape(-1).bool()]
            sums[module] = sums.get(module, 0) + x.square().sum(0)

        hooks = [layer.register_forward_pre_hook(see) for layer in layers]
        with torch.no_grad():
            for batch in batches:
                see.mask = batch["attention_mask"]
                model(**batch)
            for hook in hooks:
                hook.remove()
            for layer in layers:
                stored_in_out = type(layer).__name__ == "Conv1D"
                weight = layer.weight.t() if stored_in_out else layer.weight
                weight *= nm_mask(wanda_scores(weight, sums[layer].sqrt()), *pattern)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_decoder_is_walked_block_by_block_as_whole_passes_would(build, tokens, kind):
    model, expected = build(kind), build(kind)
    masks = prune_(model, tokens, WandaOptions())
    reference_wanda(expected, tokens)
    assert masks
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found != 0, wanted != 0), name


@pytest.fixture
def quick_walks(monkeypatch):
    """Whether the quick walk was taken, for each model that is pruned."""
    found = []
    holds = walking._Chain.holds

    def noted(walk):
        found.append(holds(walk))
        return found[-1]

    monkeypatch.setattr(walking._Chain, "holds", noted)
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("options", [WandaOptions(), SparseGPTOptions()], ids=lambda options: options.kind)
def test_the_quick_walk_and_the_one_that_holds_for_any_model_agree(
    build, tokens, kind, options, quick_walks, monkeypatch
):
    model, other = build(kind), build(kind)
    prune_(model, tokens, options)
    assert quick_walks == [True]
    monkeypatch.setattr(walking._Chain, "holds", lambda self: False)
    prune_(other, tokens, options)
    for (name, found), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)


def test_a_model_whose_blocks_do_not_just_hand_on_is_walked_whole(quick_walks):
    class Skips(nn.Module):
        """Adds the first block's output to the input of the third."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            first = self.blocks[0](x)
            return self.blocks[2](self.blocks[1](first) + first)

    torch.manual_seed(0)
    model = Skips()
    batches = [noise(20, 8, seed=seed) for seed in range(2)]
    weights = [block.weight.detach().clone() for block in model.blocks]
    prune_(model.eval(), batches, WandaOptions())
    assert quick_walks == [False]
    x = torch.cat(batches)
    first = nn.functional.linear(x, model.blocks[0].weight, model.blocks[0].bias)
    second = nn.functional.linear(first, model.blocks[1].weight, model.blocks[1].bias)
    inputs = [x, first, second + first]
    for block, weight, seen in zip(model.blocks, weights, inputs, strict=True):
        assert torch.equal(block.weight, weight * nm_mask(wanda_scores(weight, seen.norm(dim=0))))


def test_a_block_that_writes_over_its_input_is_run_only_as_the_model_runs_it(quick_walks):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)]
    model, plain = (
        nn.Sequential(*layers).eval(),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(),
    )
    plain.load_state_dict(model.state_dict())
    batch = noise(20, 8)
    prune_(model, [batch], WandaOptions())
    prune_(plain, [batch], WandaOptions())
    assert quick_walks == [False, True]
    assert torch.equal(model[2].weight, plain[2].weight)


@pytest.mark.parametrize("options", [WandaOptions(), RIAOptions(), SparseGPTOptions()], ids=lambda o: o.kind)
def test_padding_does_not_count(build, tokens, options):
    model, other = build("llama"), build("llama")
    changed = [b | {"input_ids": b["input_ids"].where(b["attention_mask"] == 1, 7)} for b in tokens]
    prune_(model, tokens, options)
    prune_(other, changed, options)
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "options",
    [MagnitudeOptions(), WandaOptions(), RIAOptions(), SparseGPTOptions(), SparseGPTOptions(update=False)],
    ids=lambda o: f"{o.kind} {getattr(o, 'update', '')}",
)
def test_exactly_half_of_every_group_is_left(build, tokens, options):
    model, dense = build("gpt2"), build("gpt2")
    masks = prune_(model, tokens, options)
    before = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in masks:
            assert torch.equal(parameter, before[name])
            continue
        assert torch.equal(parameter != 0, masks[name].kept)
        assert ((parameter != 0).unflatten(0, (-1, 4)).sum(1) == 2).all()
        moved = not torch.equal(parameter, before[name] * masks[name].kept)
        assert moved == getattr(options, "update", False)


def test_bfloat16_weights_stay_what_they_are(build, tokens):
    model = build("llama").bfloat16()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = prune_(model, tokens, WandaOptions(pattern="4:8"))
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name] * mask.kept)


def test_training_mode_is_left_for_the_time_with_a_warning(build, tokens):
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    with pytest.warns(UserWarning, match="training mode"):
        prune_(model, tokens, WandaOptions())
    assert model.training
    assert model.transformer.h[0].attn.training
    assert not model.transformer.h[1].mlp.training
    other = build("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_(other, tokens, WandaOptions())
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_what_has_no_inputs_to_measure_is_refused(build, tokens, mlp):
    with pytest.raises(InputError, match="at least one batch, got none"):
        prune_(mlp, [], WandaOptions())
    model = build("mixtral")
    with pytest.raises(InputError, match="inputs of stacked experts pass no module"):
        prune_(model, tokens, WandaOptions(experts={"down_proj": 2}))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(InputError, match=r"unused\.weight: its layer got no inputs"):
        prune_(Unused().eval(), [noise(4, 8)], WandaOptions())
    with pytest.raises(InputError, match="MaskPro learns in steps"):
        prune_(mlp, [], MaskProConfig())


ALL = [MagnitudeOptions(), WandaOptions(), RIAOptions(), SparseGPTOptions(), SparseSwapsOptions()]


@pytest.mark.parametrize("options", ALL, ids=lambda options: options.kind)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_their_own_name(build, tokens, options, value):
    model = build("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5:7] = value
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=rf"^{name}: 2 of 384 weights are NaN or infinite"):
        prune_(model, tokens, options)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[key].nan_to_num(7.0))


@pytest.mark.parametrize("options", ALL[1:], ids=lambda options: options.kind)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
def test_inputs_whose_squares_are_not_finite_are_refused(mlp, options, value):
    batch = noise(20, 8)
    batch[4, 2] = value  # 1e20 is finite, its square is not
    before = mlp[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"^0\.weight: 1 of 8 norms of its inputs .* are NaN or infinite"):
        prune_(nn.Sequential(mlp[0]).eval(), [batch], options)
    assert torch.equal(mlp[0].weight, before)
