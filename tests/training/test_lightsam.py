"""LightSAM against its equations in float64, its limits, its bounds, and closed forms."""

import copy
import math

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.options import LightSAMOptions

VARIANTS = ["adagrad_norm", "adagrad", "adam"]
LR = {"adagrad_norm": 0.3, "adagrad": 0.05, "adam": 0.02}
RHO = {"adagrad_norm": 0.2, "adagrad": 0.03, "adam": 0.01}


def problem(point, step):
    """A smooth function of three tensors that changes with the step; works on any dtype."""
    noise = torch.Generator().manual_seed(step)
    parts = [torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype) for p in point]
    return sum(((p - q) ** 2).sum() / 2 + torch.sin(3 * p).sum() for p, q in zip(point, parts, strict=True))


def start(dtype=torch.float32):
    noise = torch.Generator().manual_seed(99)
    shapes = [(3, 2), (4,), ()]
    return [
        torch.nn.Parameter(torch.randn(s, generator=noise, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def gradient(point, step):
    point = [p.detach().requires_grad_() for p in point]
    return torch.autograd.grad(problem(point, step), point)


def reference(variant, steps, lr, rho, betas=(0.9, 0.999), eps=1e-8, decay=0.0, momentum=True, sign=1.0):
    """The three algorithms, one line of the paper for one line here, in float64."""
    x = [p.detach().double() for p in start()]
    u = [torch.full_like(p, eps**2) for p in x]
    v = [torch.full_like(p, eps**2) for p in x]
    r, m = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    total_u = total_v = eps**2
    b1, b2 = betas
    for step in range(steps):
        s = [sign * g for g in gradient(x, step)]
        if variant == "adagrad_norm":
            total_u += sum((a**2).sum() for a in s)
            w = [p + rho * a / math.sqrt(total_u) for p, a in zip(x, s, strict=True)]
        elif variant == "adagrad":
            u = [a + b**2 for a, b in zip(u, s, strict=True)]
            w = [p + rho * a / b.sqrt() for p, a, b in zip(x, s, u, strict=True)]
        else:
            r = [b1 * a + (1 - b1) * b for a, b in zip(r, s, strict=True)]
            u = [b2 * a + (1 - b2) * b**2 for a, b in zip(u, s, strict=True)]
            w = [p + rho * a / b.sqrt() for p, a, b in zip(x, r if momentum else s, u, strict=True)]
        # With maximize the perturbation and the step both follow the negated function.
        g = [sign * b for b in gradient(w, step)]
        x = [(1 - lr * decay) * p for p in x]
        if variant == "adagrad_norm":
            total_v += sum((a**2).sum() for a in g)
            x = [p - lr * a / math.sqrt(total_v) for p, a in zip(x, g, strict=True)]
        elif variant == "adagrad":
            v = [a + b**2 for a, b in zip(v, g, strict=True)]
            x = [p - lr * a / b.sqrt() for p, a, b in zip(x, g, v, strict=True)]
        else:
            m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
            v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
            x = [p - lr * a / b.sqrt() for p, a, b in zip(x, m, v, strict=True)]
    return x


def run(optimizer, point, steps):
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            loss = problem(point, step)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_follows_the_papers_algorithm(variant, decay, fused):
    point = start(torch.float64)
    optimizer = LightSAM(point, LR[variant], RHO[variant], variant, weight_decay=decay, fused=fused)
    run(optimizer, point, range(25))
    for got, wanted in zip(
        point, reference(variant, 25, LR[variant], RHO[variant], decay=decay), strict=True
    ):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_stays_close_to_float64(variant, fused):
    point = start()
    run(LightSAM(point, LR[variant], RHO[variant], variant, fused=fused), point, range(25))
    for got, wanted in zip(point, reference(variant, 25, LR[variant], RHO[variant]), strict=True):
        torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maximize_is_the_negated_function(variant):
    up, down = start(torch.float64), start(torch.float64)
    climbing = LightSAM(up, LR[variant], RHO[variant], variant, maximize=True, weight_decay=0.1)
    descending = LightSAM(down, LR[variant], RHO[variant], variant, weight_decay=0.1)
    for step in range(8):
        for optimizer, point, sign in ((climbing, up, 1.0), (descending, down, -1.0)):

            def closure(optimizer=optimizer, point=point, sign=sign, step=step):
                optimizer.zero_grad()
                loss = sign * problem(point, step)
                loss.backward()
                return loss

            optimizer.step(closure)
    for a, b in zip(up, down, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_ascent_without_momentum_follows_this_batch(fused):
    point = start(torch.float64)
    run(LightSAM(point, 0.02, 0.01, ascent_momentum=False, fused=fused), point, range(15))
    for got, wanted in zip(point, reference("adam", 15, 0.02, 0.01, momentum=False), strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-6, atol=1e-8)


def test_a_parabola_worked_by_hand():
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LightSAM([x], 0.1, 0.1, "I", eps=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0.5
    assert x.item() == pytest.approx(0.9)
    optimizer.step(closure)
    w = 0.9 + 0.1 * 0.9 / math.sqrt(1.81)
    assert x.item() == pytest.approx(0.9 - 0.1 * w / math.sqrt(1.21 + w * w))
    assert optimizer.last.perturbed_loss.item() == pytest.approx(w * w / 2)


def test_without_a_radius_it_is_the_optimizer_it_is_made_of():
    tiny = 1e-12
    ours, theirs = start(torch.float64), start(torch.float64)
    run(LightSAM(ours, 0.05, tiny, "adagrad"), ours, range(20))
    adagrad = torch.optim.Adagrad(theirs, lr=0.05, initial_accumulator_value=1e-16, eps=0.0)
    run(adagrad, theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    ours, theirs = start(torch.float64), [p.detach() for p in start(torch.float64)]
    run(LightSAM(ours, 0.3, tiny, "adagrad_norm"), ours, range(20))
    total = 1e-16
    for step in range(20):
        g = gradient(theirs, step)
        total += sum((a**2).sum() for a in g)
        theirs = [p - 0.3 * a / total.sqrt() for p, a in zip(theirs, g, strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-7, atol=1e-9)

    ours, theirs = start(torch.float64), start(torch.float64)
    run(LightSAM(ours, 0.02, tiny, "adam", eps=1e-30**0.5), ours, range(20))
    adam = torch.optim.Adam(theirs, eps=0.0)
    for step in range(20):
        # Adam without its bias corrections: undo them in the learning rate.
        adam.param_groups[0]["lr"] = 0.02 * (1 - 0.9 ** (step + 1)) / math.sqrt(1 - 0.999 ** (step + 1))
        adam.zero_grad()
        problem(theirs, step).backward()
        adam.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_step_has_the_promised_length(fused):
    for variant in VARIANTS:
        point = start(torch.float64)
        optimizer = LightSAM(point, 0.07, 0.03, variant, fused=fused)
        before = [p.detach().clone() for p in point]
        problem(point, 0).backward()
        optimizer.first_step(zero_grad=True)
        up = torch.cat([(p - q).detach().flatten() for p, q in zip(point, before, strict=True)])
        problem(point, 0).backward()
        optimizer.second_step()
        down = torch.cat([(p - q).detach().flatten() for p, q in zip(point, before, strict=True)])
        if variant == "adagrad_norm":
            assert up.norm().item() == pytest.approx(0.03)
            assert down.norm().item() == pytest.approx(0.07)
        else:
            factor = 1.0 if variant == "adagrad" else 0.1 / math.sqrt(0.001)
            torch.testing.assert_close(up.abs(), torch.full_like(up, 0.03 * factor))
            torch.testing.assert_close(down.abs(), torch.full_like(down, 0.07 * factor))


def test_no_perturbation_or_step_exceeds_its_bound():
    bound = {"adagrad_norm": 1.0, "adagrad": 1.0, "adam": 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))}
    for variant in VARIANTS:
        point = start()
        optimizer = LightSAM(point, 0.02, 0.01, variant)
        for step in range(60):
            scale = 10.0 ** (step % 9 - 4)
            before = [p.detach().clone() for p in point]
            (problem(point, step) * scale).backward()
            optimizer.first_step(zero_grad=True)
            up = torch.cat([(p - q).detach().flatten() for p, q in zip(point, before, strict=True)])
            (problem(point, step) * scale).backward()
            optimizer.second_step(zero_grad=True)
            down = torch.cat([(p - q).detach().flatten() for p, q in zip(point, before, strict=True)])
            for move, rate in ((up, 0.01), (down, 0.02)):
                size = move.norm() if variant == "adagrad_norm" else move.abs().max()
                assert size <= rate * bound[variant] * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_learning_rate_of_zero_the_weights_stay_bit_for_bit(variant, dtype):
    point = start(dtype)
    before = [p.detach().clone() for p in point]
    places = [p.data_ptr() for p in point]
    run(LightSAM(point, 0.0, 0.1, variant), point, range(20))
    assert all(torch.equal(p, q) for p, q in zip(point, before, strict=True))
    assert [p.data_ptr() for p in point] == places


@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_bit_weights_keep_their_statistics_in_float32(variant, caplog):
    point = start(torch.bfloat16)
    optimizer = LightSAM(point, LR[variant], RHO[variant], variant)
    assert "16-bit weights" in caplog.text
    run(optimizer, point, range(10))
    saved = copy.deepcopy(optimizer.state_dict())
    again = LightSAM(start(torch.bfloat16), variant=variant)
    again.load_state_dict(saved)
    for state in again.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    ours = [p.detach().double() for p in point]
    for a, b in zip(ours, reference(variant, 10, LR[variant], RHO[variant]), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_a_parameter_group_has_its_own_rates_and_one_shared_sum():
    point = start(torch.float64)
    groups = [{"params": point[:1], "lr": 0.0, "rho": 0.0}, {"params": point[1:]}]
    optimizer = LightSAM(groups, 0.3, 0.2, "adagrad_norm")
    before = point[0].detach().clone()
    run(optimizer, point, range(5))
    assert torch.equal(point[0], before)
    assert optimizer.param_groups[0]["ascent_sum"] is optimizer.param_groups[1]["ascent_sum"]
    # The frozen group's gradients count in the sums all the same.
    alone = start(torch.float64)
    other = LightSAM(alone[1:], 0.3, 0.2, "adagrad_norm")
    run(other, alone, range(5))
    assert other.param_groups[0]["descent_sum"] < optimizer.param_groups[0]["descent_sum"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(variant, fused):
    point = start()
    optimizer = LightSAM(point, LR[variant], RHO[variant], variant, fused=fused)
    run(optimizer, point, range(7))
    weights, saved = [p.detach().clone() for p in point], copy.deepcopy(optimizer.state_dict())
    run(optimizer, point, range(7, 14))
    again = [torch.nn.Parameter(w) for w in weights]
    resumed = LightSAM(again, LR[variant], RHO[variant], variant, fused=fused)
    resumed.load_state_dict(saved)
    run(resumed, again, range(7, 14))
    assert all(torch.equal(p, q) for p, q in zip(point, again, strict=True))


def test_saved_states_hold_no_copy_of_the_weights():
    sizes = {"adagrad_norm": 0, "adagrad": 2, "adam": 4}
    for variant, tensors in sizes.items():
        point = start()
        optimizer = LightSAM(point, variant=variant)
        run(optimizer, point, range(2))
        state = optimizer.state_dict()["state"]
        held = sum(value.numel() for entry in state.values() for value in entry.values())
        assert held == tensors * sum(p.numel() for p in point)


def test_rows_that_never_occur_do_not_become_nan():
    torch.set_flush_denormal(True)
    try:
        for fused in (True, False):
            table = torch.nn.Embedding(4, 3)
            optimizer = LightSAM(table.parameters(), 1e-3, 1e-3, betas=(0.5, 0.9), fused=fused)
            rows = torch.tensor([0, 2])

            def closure(table=table, optimizer=optimizer, rows=rows):
                optimizer.zero_grad()
                loss = table(rows).square().sum()
                loss.backward()
                return loss

            unused = table.weight[1].detach().clone()
            for _ in range(700):
                optimizer.step(closure)
            assert torch.isfinite(table.weight).all()
            assert torch.equal(table.weight[1], unused)
    finally:
        torch.set_flush_denormal(False)


def test_complex_weights_are_pairs_of_real_ones():
    noise = torch.Generator().manual_seed(1)
    for variant in VARIANTS:
        whole = torch.nn.Parameter(torch.randn(3, dtype=torch.complex128, generator=noise))
        pairs = torch.nn.Parameter(torch.view_as_real(whole.detach()).clone())
        for parameter in (whole, pairs):
            optimizer = LightSAM([parameter], 0.1, 0.1, variant)
            for _ in range(4):

                def closure(parameter=parameter, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = (
                        (parameter.abs() ** 4).sum()
                        if parameter.is_complex()
                        else (parameter**2).sum(-1).square().sum()
                    )
                    loss.backward()
                    return loss

                optimizer.step(closure)
        torch.testing.assert_close(torch.view_as_real(whole.detach()), pairs.detach())


BAD = [
    ({"lr": -1.0}, "lr must be >= 0"),
    ({"rho": -0.1}, "rho must be >= 0 and finite, got -0.1"),
    ({"rho": math.nan}, "rho must be >= 0"),
    ({"eps": 0.0}, "starting value"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
    ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ({"variant": "adagradnorm"}, "no LightSAM variant `adagradnorm`; did you mean `adagrad_norm`"),
    ({"betas": (0.9, 0.05), "fused": True}, "fused kernels need"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        LightSAM(start(), **options)


def test_odd_settings_get_a_warning(caplog):
    big = [torch.nn.Parameter(torch.zeros(400, 400))]
    LightSAM(big, rho=0.05)
    assert "about 20 for all 160000 weights" in caplog.text
    LightSAM(start(), betas=(0.95, 0.9))
    assert "beta1² >= beta2" in caplog.text
    caplog.clear()
    LightSAM(big, rho=0.05, variant="I")
    LightSAM(big)
    assert not caplog.records


def test_the_options_build_the_optimizer():
    options = LightSAMOptions(variant="LightSAM-II", rho=0.3)
    optimizer = options.optimizer(start(), lr=0.5, weight_decay=0.1)
    assert optimizer.variant == options.variant == "adagrad"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rho"], group["weight_decay"]) == (0.5, 0.3, 0.1)
    assert LightSAMOptions().optimizer(start()).param_groups[0]["rho"] == 1e-3
    with pytest.raises(InputError, match="did you mean `adam`"):
        LightSAMOptions(variant="adams")
