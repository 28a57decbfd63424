"""WUDI against its loss, walked down by PyTorch's own Adam, and solved."""

import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts

NAME = "model.layers.0.mlp.weight"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def merged(deltas, name=NAME, config=None, **options):
    base = np.zeros(deltas.shape[1:], np.float32)
    models = [{name: delta.astype(np.float32)} for delta in deltas]
    return merge_state_dicts({name: base}, models, "wudi", config=config, **options)[name]


def loss(merged, deltas):
    sizes = (deltas**2).sum(dim=(1, 2))
    return ((((merged - deltas) @ deltas.mT) ** 2).sum(dim=(1, 2)) / sizes).sum()


@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 12, 5)])
@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-5), (1, 1e-3), (40, 1e-2)])
def test_it_walks_down_its_loss_as_adam_does(shape, steps, lr):
    deltas = torch.from_numpy(random(*shape))
    wanted = torch.nn.Parameter(deltas.sum(dim=0))
    optimizer = torch.optim.Adam([wanted], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(wanted, deltas).backward()
        optimizer.step()
    found = merged(deltas.numpy(), steps=steps, lr=lr)
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_exact_solver_ends_where_no_change_lowers_the_loss():
    deltas = torch.from_numpy(random(3, 6, 10))
    found = torch.from_numpy(merged(deltas.numpy(), solver="exact")).double().requires_grad_()
    least = loss(found, deltas)
    least.backward()
    assert found.grad.abs().max() < 1e-3
    walked = torch.from_numpy(merged(deltas.numpy(), steps=5000, lr=1e-3)).double()
    assert loss(walked, deltas) >= least - 1e-6
    assert loss(walked, deltas) < 1.05 * least


def test_tasks_on_inputs_of_their_own_add_up():
    deltas = np.zeros((2, 5, 8))
    deltas[0, :, :3], deltas[1, :, 3:] = random(5, 3), random(5, 5, seed=1)
    for options in ({"solver": "exact"}, {"steps": 50, "lr": 1e-3}):
        np.testing.assert_allclose(merged(deltas, **options), deltas.sum(axis=0), atol=1e-4)


def test_one_task_is_that_task_and_one_that_changed_nothing_is_left_out():
    deltas = random(2, 6, 10)
    np.testing.assert_allclose(merged(deltas[:1], lr=1e-3), deltas[0], rtol=1e-4, atol=1e-5)
    padded = np.stack([deltas[0], np.zeros((6, 10)), deltas[1]])
    np.testing.assert_allclose(merged(padded, lr=1e-3), merged(deltas, lr=1e-3), rtol=1e-5, atol=1e-6)
    assert not merged(np.zeros((2, 3, 4))).any()


def test_layers_stored_inputs_first_are_turned():
    deltas = random(2, 6, 10)
    wanted = merged(deltas, solver="exact")
    stored = np.ascontiguousarray(deltas.transpose(0, 2, 1))
    gpt2 = {"model_type": "gpt2"}
    found = merged(stored, name="h.0.mlp.c_fc.weight", config=gpt2, solver="exact")
    np.testing.assert_allclose(found.T, wanted, rtol=1e-4, atol=1e-5)
    assert abs(merged(stored, solver="exact").T - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps: must be a whole number from 0 on, got -1"),
        ({"lr": 0.0}, r"lr: must be in \(0, inf\), got 0"),
        ({"solver": "sgd"}, "solver: must be one of adam, exact"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        merged(random(2, 3, 4), **options)
