"""The two passes of a step: their order, what each may see, the weights in between; SAM and ASAM."""

import copy
import math

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.options import SAMOptions
from weightsmith.training.lightsam.sam import ASAM, SAM

MAKERS = {
    "I": lambda params, **more: LightSAM(params, 0.3, 0.2, "I", **more),
    "II": lambda params, **more: LightSAM(params, 0.05, 0.05, "II", **more),
    "III": lambda params, **more: LightSAM(params, 0.02, 0.02, "III", **more),
    "SAM": lambda params, **more: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, **more),
    "ASAM": lambda params, **more: ASAM(params, torch.optim.AdamW, lr=0.01, **more),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def net(*middle):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), *middle, torch.nn.Tanh(), torch.nn.Linear(6, 2))


def loss(model, step, rows=8):
    noise = torch.Generator().manual_seed(step)
    x, y = torch.randn(rows, 4, generator=noise), torch.randn(rows, 2, generator=noise)
    return (model(x) - y).square().mean()


def closure_of(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        return value

    return closure


def train(model, optimizer, steps):
    for step in steps:
        optimizer.step(closure_of(model, optimizer, step))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@every
def test_all_ways_to_write_a_step_are_the_same_step(make):
    models = [net() for _ in range(4)]
    whole, halves, block, begun = (make(model.parameters()) for model in models)
    for step in range(6):
        value = whole.step(closure_of(models[0], whole, step))
        assert value.item() == loss(models[1], step).item()

        halves.zero_grad()
        loss(models[1], step).backward()
        halves.first_step(zero_grad=True)
        loss(models[1], step).backward()
        halves.second_step(zero_grad=True)

        block.zero_grad()
        loss(models[2], step).backward()
        with block.perturbed():
            loss(models[2], step).backward()
        block.step()

        begun.zero_grad()
        loss(models[3], step).backward()
        assert begun.step(closure_of(models[3], begun, step), first_pass_done=True) is None
        assert all(same(models[0], model) for model in models[1:])


@every
def test_micro_batches_equal_one_batch(make):
    whole, parts = net(), net()
    one, many = make(whole.parameters()), make(parts.parameters())
    for step in range(5):
        one.step(closure_of(whole, one, step))

        def closure(step=step):
            many.zero_grad()
            noise = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 4, generator=noise), torch.randn(8, 2, generator=noise)
            for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
                ((parts(a) - b).square().mean() / 4).backward()

        many.step(closure)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@every
def test_a_gradient_in_the_first_pass_only_moves_nothing_for_good(make):
    model = net()
    optimizer = make(model.parameters())
    before = weights(model)
    loss(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    loss(model, 0).backward()
    model[0].weight.grad = None
    optimizer.second_step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[0].bias, before[1])


@every
def test_a_gradient_in_the_second_pass_only_updates_from_the_weights_as_they_are(make):
    model = net()
    optimizer = make(model.parameters())
    before = weights(model)
    loss(model, 0).backward()
    model[0].weight.grad = None
    optimizer.first_step(zero_grad=True)
    assert torch.equal(model[0].weight, before[0])
    loss(model, 0).backward()
    optimizer.second_step()
    moved = (model[0].weight - before[0]).abs()
    assert 0 < moved.max() < 0.4
    train(model, optimizer, range(1, 3))


@every
def test_weights_keep_their_storage_and_saved_states_no_copy(make):
    model = net()
    optimizer = make(model.parameters())
    places = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, range(3))
    assert [p.data_ptr() for p in model.parameters()] == places
    for parameter, state in optimizer.state.items():
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert not any(torch.equal(value, parameter) for value in tensors)


@every
def test_pieces_of_one_flat_tensor_train_like_parameters_of_their_own(make):
    model, flat = net(), net()
    whole = torch.cat([p.detach().flatten() for p in flat.parameters()])
    pieces = whole.split([p.numel() for p in flat.parameters()])
    for parameter, piece in zip(flat.parameters(), pieces, strict=True):
        parameter.data = piece.view(parameter.shape)
    optimizer = make(flat.parameters())
    loss(flat, 0).backward()
    before = whole.clone()
    with optimizer.perturbed():
        assert not torch.equal(whole, before)  # whoever reads the flat tensor sees the perturbed point
        loss(flat, 0).backward()
    assert torch.equal(whole, before)
    optimizer.step()
    train(flat, optimizer, range(1, 3))
    train(model, make(model.parameters()), range(3))
    assert same(model, flat)
    assert torch.equal(whole, torch.cat([p.detach().flatten() for p in model.parameters()]))


@every
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(make):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(5))
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert same(model, other)


@every
def test_a_closure_that_fails_leaves_the_weights_as_they_were(make):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    before, calls = weights(model), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(model, optimizer, 2)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, optimizer, range(2, 4))


@every
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_gradient_that_is_not_finite_skips_the_step(make, bad_pass, caplog):
    model, clean = net(), net()
    optimizer, other = make(model.parameters()), make(clean.parameters())
    train(model, optimizer, range(3))
    train(clean, other, range(3))
    before, calls = weights(model), []

    def closure():
        value = closure_of(model, optimizer, 3)()
        if len(calls) == bad_pass:
            model[2].bias.grad[0] = math.nan
        calls.append(1)
        return value

    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped == 1
    assert "the step is skipped" in caplog.text
    train(model, optimizer, range(4, 6))
    train(clean, other, range(4, 6))
    if bad_pass == 0 or isinstance(optimizer, SAM):
        assert same(model, clean)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@every
def test_both_passes_draw_the_same_dropout_masks_and_the_stream_goes_on_as_in_one_pass(make):
    model = net(torch.nn.Dropout(0.5))
    optimizer = make(model.parameters())
    masks = []
    model[1].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    torch.manual_seed(5)
    train(model, optimizer, range(2))
    after = torch.rand(())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    torch.manual_seed(5)
    for step in range(2):
        loss(model, step)
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("momentum", [0.1, None])
@every
def test_running_statistics_see_the_first_pass_only(make, momentum):
    model = net(torch.nn.BatchNorm1d(6, momentum=momentum))
    optimizer = make(model.parameters(), model=model)
    plain = copy.deepcopy(model)
    loss(plain, 0)
    train(model, optimizer, [0])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(plain[1], name))


def scaled_step(model, optimizer, scaler, step, factor=1.0):
    optimizer.zero_grad()
    scaler.scale(loss(model, step)).backward()
    with optimizer.perturbed(grad_scale=scaler.get_scale()):
        scaler.scale(loss(model, step) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


@every
def test_loss_scaling_changes_nothing(make):
    plain, scaled = net(), net()
    one, two = make(plain.parameters()), make(scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for step in range(8):
        one.step(closure_of(plain, one, step))
        scaled_step(scaled, two, scaler, step)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@every
def test_an_overflow_that_the_scaler_finds_leaves_the_weights_and_the_next_step_works(make):
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled_step(model, optimizer, scaler, 0)
    before = weights(model)
    scaled_step(model, optimizer, scaler, 1, factor=math.inf)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**11
    scaled_step(model, optimizer, scaler, 2)
    assert not same(model, net())
    assert optimizer.skipped == 1


@every
def test_attached_clipping_acts_on_the_second_gradient(make):
    model, by_hand = net(), net()
    optimizer, other = make(model.parameters()), make(by_hand.parameters())
    AdaGC(model, warmup_steps=1, init="ema").attach(optimizer)
    clip = AdaGC(by_hand, warmup_steps=1, init="ema")
    for step in range(5):
        for net_, opt in ((model, optimizer), (by_hand, other)):
            opt.zero_grad()
            loss(net_, step).backward()
            opt.first_step(zero_grad=True)
            loss(net_, step).backward()
        optimizer.second_step()
        clip.step()
        other.second_step()
    assert same(model, by_hand)


@every
def test_calls_in_the_wrong_order_are_refused(make):
    model = net()
    optimizer = make(model.parameters())
    with pytest.raises(InputError, match="without a step begun"):
        optimizer.step()
    with pytest.raises(InputError, match="without a step begun"):
        optimizer.second_step()
    with pytest.raises(InputError, match="without a first_step"):
        optimizer.restore()
    with pytest.raises(InputError, match="no parameter has a gradient"):
        optimizer.first_step()
    with pytest.raises(InputError, match="no parameter has a gradient"):
        optimizer.step(lambda: None)
    loss(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(InputError, match="first_step twice"):
        optimizer.first_step()
    with pytest.raises(InputError, match="perturbed point"):
        optimizer.state_dict()
    with pytest.raises(InputError, match="between the two passes"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(InputError, match="in the middle of a step"):
        optimizer.step(closure_of(model, optimizer, 0))
    optimizer.restore()
    optimizer.state_dict()


@every
def test_groups_can_be_added_between_steps_and_schedulers_work(make):
    model, head = net(), torch.nn.Linear(2, 1)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rate = optimizer.param_groups[0]["lr"]
    train(model, optimizer, range(2))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2
    optimizer.add_param_group({"params": head.parameters()})
    before = weights(head)

    def closure():
        optimizer.zero_grad()
        value = head(model(torch.ones(2, 4))).square().mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert not torch.equal(head.weight, before[0])


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = LightSAM(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        optimizer.first_step()


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_sam_and_asam_follow_their_equations(eta):
    adaptive = eta is not None
    model = net().double()
    x = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in x]
    kwargs = {"adaptive": True, "eta": eta} if adaptive else {}
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.2, momentum=0.9, **kwargs)

    def gradient(point, step):
        shadow = copy.deepcopy(model)
        with torch.no_grad():
            for p, q in zip(shadow.parameters(), point, strict=True):
                p.copy_(q)
        shadow.zero_grad()
        noise = torch.Generator().manual_seed(step)
        a, b = torch.randn(8, 4, generator=noise).double(), torch.randn(8, 2, generator=noise).double()
        (shadow(a) - b).square().mean().backward()
        return [p.grad for p in shadow.parameters()]

    for step in range(5):
        s = gradient(x, step)
        sizes = [p.abs() + eta if adaptive else torch.ones_like(p) for p in x]
        length = math.sqrt(sum(((t * a) ** 2).sum() for t, a in zip(sizes, s, strict=True)))
        w = [p + 0.1 * t * t * a / length for p, t, a in zip(x, sizes, s, strict=True)]
        momenta = [0.9 * m + g for m, g in zip(momenta, gradient(w, step), strict=True)]
        x = [p - 0.2 * m for p, m in zip(x, momenta, strict=True)]

        def closure(step=step):
            optimizer.zero_grad()
            noise = torch.Generator().manual_seed(step)
            a, b = torch.randn(8, 4, generator=noise).double(), torch.randn(8, 2, generator=noise).double()
            value = (model(a) - b).square().mean()
            value.backward()
            return value

        optimizer.step(closure)
    for p, q in zip(model.parameters(), x, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-10)


def test_sam_without_a_radius_is_its_base_optimizer():
    ours, theirs = net(), net()
    train(ours, SAM(ours.parameters(), torch.optim.AdamW, rho=0.0, lr=0.01), range(6))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01), range(6))
    assert same(ours, theirs)


def test_sam_options_build_the_optimizer():
    optimizer = SAMOptions(adaptive=True).optimizer(net().parameters(), torch.optim.AdamW, lr=0.3)
    group = optimizer.param_groups[0]
    assert (optimizer.adaptive, group["rho"], group["lr"]) == (True, 0.5, 0.3)
    with pytest.raises(InputError, match="rho must be >= 0"):
        SAMOptions(rho=-1.0)
    with pytest.raises(InputError, match="eta must be >= 0"):
        SAM(net().parameters(), torch.optim.SGD, lr=0.1, eta=-1.0)
