"""Running means: against PyTorch's in fp32, where PyTorch's rounds, and going on after a stop."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightsmith.errors import InputError
from weightsmith.training import RunningAverage


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def move(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_the_means_equal_pytorchs_in_float32(kind):
    model = net()
    function = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    theirs = AveragedModel(model, multi_avg_fn=function)
    ours = RunningAverage(model, kind=kind, decay=0.9)
    for step in range(12):
        move(model, step)
        ours.update()
        theirs.update_parameters(model)
    own = [parameter.clone() for parameter in model.parameters()]
    with ours.applied():
        for mine, other in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for mine, before in zip(model.parameters(), own, strict=True):
        assert torch.equal(mine, before)


def test_in_bfloat16_the_mean_is_closer_to_the_truth_than_pytorchs():
    model = net(torch.bfloat16)
    theirs, ours, exact = AveragedModel(model), RunningAverage(model, kind="swa"), []
    for step in range(100):
        move(model, step)
        ours.update()
        theirs.update_parameters(model)
        exact.append(model[0].weight.detach().double())
    mean = torch.stack(exact).mean(0)
    pytorchs = (theirs.module[0].weight.double() - mean).norm()
    with ours.applied():
        assert (model[0].weight.double() - mean).norm() < 0.5 * pytorchs
        assert model[0].weight.dtype == torch.bfloat16


def test_a_running_mean_goes_on_with_the_same_bits():
    whole, model = net(), net()
    expected, first = (
        RunningAverage(whole, kind="ema", decay=0.8),
        RunningAverage(model, kind="ema", decay=0.8),
    )
    for step in range(8):
        move(whole, step)
        expected.update()
    for step in range(5):
        move(model, step)
        first.update()
    saved = first.state_dict()
    again = RunningAverage(model, kind="ema", decay=0.8)
    again.load_state_dict(saved)
    for step in range(5, 8):
        move(model, step)
        again.update()
    assert again.num_updates == 8
    for name, mean in again.state_dict()["means"].items():
        assert torch.equal(mean, expected.state_dict()["means"][name])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="kind must be swa or ema"):
        RunningAverage(net(), kind="mean")
    with pytest.raises(InputError, match="decay must be"):
        RunningAverage(net(), decay=1.0)
    with pytest.raises(InputError, match="has seen no state"):
        RunningAverage(net()).load_into_model()
    average = RunningAverage(net())
    average.update()
    with pytest.raises(InputError, match=r"weight is \(3, 4\), the saved mean has"):
        RunningAverage(nn.Linear(4, 3)).load_state_dict(average.state_dict())
