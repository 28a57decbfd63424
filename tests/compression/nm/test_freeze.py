"""Training after pruning keeps the zeros."""

import pytest
import torch

from weightsmith.compression.nm import FrozenMask, MagnitudeOptions, freeze_mask_, prune_
from weightsmith.errors import InputError

OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_later_training_moves_what_is_kept_and_nothing_else(mlp, points, cross_entropy, make):
    masks = prune_(mlp, options=MagnitudeOptions())
    freeze_mask_(mlp, masks)
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    optimizer = make(mlp.parameters())
    for batch in points * 3:
        optimizer.zero_grad()
        cross_entropy(mlp, batch).backward()
        optimizer.step()
    for name, mask in masks.items():
        weight = mlp.get_parameter(name)
        assert torch.equal(weight != 0, mask.kept)
        assert not torch.equal(weight, before[name])


def test_without_masks_the_zeros_are_the_mask(mlp, points, cross_entropy):
    masks = prune_(mlp, options=MagnitudeOptions())
    frozen = freeze_mask_(mlp)
    assert all(torch.equal(frozen.masks[name], mask.kept) for name, mask in masks.items())


def test_gradients_pass_again_when_the_mask_is_removed(mlp, points, cross_entropy):
    prune_(mlp, options=MagnitudeOptions())
    frozen = freeze_mask_(mlp)
    cross_entropy(mlp, points[0]).backward()
    assert mlp[0].weight.grad[~frozen.masks["0.weight"]].eq(0).all()
    frozen.remove()
    mlp.zero_grad()
    cross_entropy(mlp, points[0]).backward()
    assert mlp[0].weight.grad[~frozen.masks["0.weight"]].ne(0).any()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_momentum_from_before_the_pruning_moves_no_pruned_weight(mlp, points, cross_entropy, make):
    optimizer = make(mlp.parameters())

    def train():
        for batch in points:
            optimizer.zero_grad()
            cross_entropy(mlp, batch).backward()
            optimizer.step()

    train()
    masks = prune_(mlp, options=MagnitudeOptions())
    frozen = freeze_mask_(mlp, masks, optimizer=optimizer)
    train()
    for name, mask in masks.items():
        assert torch.equal(mlp.get_parameter(name) != 0, mask.kept)
    frozen.remove()
    train()
    assert frozen.remask_() > 0


def test_a_parameter_that_is_unfrozen_later_keeps_its_zeros(mlp, points, cross_entropy):
    masks = prune_(mlp, options=MagnitudeOptions())
    mlp[0].weight.requires_grad_(False)
    freeze_mask_(mlp, masks)
    assert not mlp[0].weight.requires_grad
    assert mlp[2].weight.requires_grad
    mlp[0].weight.requires_grad_(True)
    before = mlp[0].weight.detach().clone()
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    cross_entropy(mlp, points[0]).backward()
    optimizer.step()
    assert torch.equal(mlp[0].weight != 0, masks["0.weight"].kept)
    assert not torch.equal(mlp[0].weight, before)


def test_masks_follow_gradients_to_their_device_once(mlp, points):
    """Of other devices a machine without accelerator has only `meta`."""
    masks = {name: mask.kept for name, mask in prune_(mlp, options=MagnitudeOptions()).items()}
    mlp.to("meta")
    frozen = FrozenMask(mlp, masks)
    mlp(points[0][0].to("meta")).sum().backward()
    moved = frozen.masks["0.weight"]
    assert moved.device.type == mlp[0].weight.grad.device.type == "meta"
    mlp.zero_grad()
    mlp(points[0][0].to("meta")).sum().backward()
    assert frozen.masks["0.weight"] is moved


@pytest.mark.gpu
def test_a_model_that_goes_to_the_gpu_after_the_freezing_keeps_its_zeros(mlp, points, cross_entropy):
    masks = prune_(mlp, options=MagnitudeOptions())
    freeze_mask_(mlp, masks)
    mlp.cuda()
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.01)
    cross_entropy(mlp, [part.cuda() for part in points[0]]).backward()
    optimizer.step()
    for name, mask in masks.items():
        assert torch.equal(mlp.get_parameter(name).cpu() != 0, mask.kept)


def test_a_merged_adapter_is_masked_again(build):
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    masks = prune_(model, options=MagnitudeOptions())
    frozen = freeze_mask_(model, masks)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(InputError, match=r"the model has no such parameter; call merge_and_unload\(\) first"):
        frozen.remask_(adapted)
    merged = adapted.merge_and_unload()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (merged.get_parameter(name) != 0).all()
    moved = frozen.remask_(merged)
    assert moved == 2 * 16 * 8  # half of q_proj in each of two layers
    assert frozen.remask_(merged) == 0
    assert torch.equal(merged.get_parameter(name) != 0, masks[name].kept)


def test_masks_that_do_not_fit_and_dense_models_are_refused(mlp):
    with pytest.raises(InputError, match="no linear layer has a weight that is 0"):
        freeze_mask_(mlp)
    with pytest.raises(InputError, match=r"0\.weight: mask of \[2, 2\], the model has \[16, 8\]"):
        freeze_mask_(mlp, {"0.weight": torch.ones(2, 2)})
    with pytest.raises(InputError, match=r"9\.weight: mask of \[2, 2\], the model has no such parameter"):
        freeze_mask_(mlp, {"9.weight": torch.ones(2, 2)})
