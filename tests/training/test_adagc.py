"""AdaGC against the equations written out in float64, its limits, and gradients no rule expects."""

import copy
import json
import math

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.adagc.rule import clip_norms
from weightsmith.training.adagc.watch import NonFiniteGradientError, Watch

SHAPES = {"matrix": (4, 3), "vector": (5,), "scalar": ()}


def reference(gradients, memory, rel=1.05, beta=0.98, absolute=1.0, warmup=100, init="min", eps=1e-6):
    """One step of the paper's equations on float64 lists; `memory` holds step and gamma by name."""
    memory["step"] += 1
    norms = {name: math.sqrt(sum(x * x for x in values)) for name, values in gradients.items()}
    total = math.sqrt(sum(norm * norm for norm in norms.values()))
    out = {}
    for name, values in gradients.items():
        norm, gamma = norms[name], memory["gamma"].get(name)
        if memory["step"] <= warmup:
            factor = min(1.0, absolute / (total + eps))
            seed = factor * norm
            if init == "ema" and gamma is not None:
                seed = beta * gamma + (1 - beta) * seed
            elif init == "min" and gamma is not None:
                seed = min(gamma, seed)
            new = seed
        else:
            gamma = norm if gamma is None else gamma
            factor = rel * gamma / (norm + eps) if norm > rel * gamma else 1.0
            new = beta * gamma + (1 - beta) * min(norm, rel * gamma)
        out[name] = [factor * x for x in values]
        if norm > 0:
            memory["gamma"][name] = new
    return out


def named(shapes=SHAPES, dtype=torch.float32):
    return [(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes.items()]


def fill(parameters, seed, scale=1.0):
    """Give every parameter a gradient whose size wanders over two decades."""
    noise = torch.Generator().manual_seed(seed)
    for index, (_, parameter) in enumerate(parameters):
        size = scale * 10 ** torch.empty(()).uniform_(-1, 1, generator=noise) / (index + 1)
        parameter.grad = (size * torch.randn(parameter.shape, generator=noise)).to(parameter.dtype)


def gradients(parameters):
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


@pytest.mark.parametrize("init", ["min", "ema", "last"])
def test_every_step_follows_the_equations(init):
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=6, init=init, beta=0.9, lambda_rel=1.2)
    memory = {"step": 0, "gamma": {}}
    for step in range(60):
        fill(parameters, step)
        if step in (2, 20):
            parameters[0][1].grad.zero_()
        given = {
            name: gradient.double().flatten().tolist() for name, gradient in gradients(parameters).items()
        }
        wanted = reference(given, memory, 1.2, 0.9, warmup=6, init=init)
        stats = clip.step()
        for (name, parameter), norm in zip(parameters, stats.pre_norm, strict=True):
            torch.testing.assert_close(
                parameter.grad.flatten(),
                torch.tensor(wanted[name]),
                rtol=1e-5,
                atol=1e-8,
                msg=f"{name} {step}",
            )
            assert norm == pytest.approx(math.sqrt(sum(x * x for x in given[name])), rel=1e-6)
        gamma = [memory["gamma"].get(name, math.inf) for name in clip.names]
        torch.testing.assert_close(clip.gamma, torch.tensor(gamma), rtol=1e-5, atol=0)
    assert clip.steps == 60


def test_the_trace_worked_by_hand():
    parameter = torch.nn.Parameter(torch.zeros(1))
    clip = AdaGC([parameter], warmup_steps=2, lambda_abs=1.0, beta=0.9, lambda_rel=1.5, eps=0.0)
    for norm, clipped, gamma in [(4.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.9, 0.75, 0.525), (0.1, 0.1, 0.4825)]:
        parameter.grad = torch.tensor([norm])
        clip.step()
        assert parameter.grad.item() == pytest.approx(clipped)
        assert clip.gamma.item() == pytest.approx(gamma)


def test_an_infinite_threshold_leaves_gradients_bit_for_bit():
    parameters = named()
    clip = AdaGC(parameters, lambda_rel=math.inf, warmup_steps=0)
    for step in range(5):
        fill(parameters, step)
        before = gradients(parameters)
        clip.step()
        assert all(torch.equal(before[name], p.grad) for name, p in parameters)


def test_warm_up_is_the_global_clipping_of_torch():
    ours, theirs = named(), named()
    clip = AdaGC(ours, warmup_steps=10, lambda_abs=0.7)
    for step in range(10):
        fill(ours, step)
        fill(theirs, step)
        total = torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 0.7)
        assert clip.step().global_norm == pytest.approx(total.item(), rel=1e-6)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_one_tensor_alone_is_the_global_rule():
    alone, together = named({"a": (7,)}), named({"a": (7,)})
    by_tensor = AdaGC(alone, warmup_steps=3)
    by_all = AdaGC(together, warmup_steps=3, granularity="global")
    assert by_all.names == ("*",)
    for step in range(20):
        fill(alone, step)
        fill(together, step)
        by_tensor.step()
        by_all.step()
        assert torch.equal(alone[0][1].grad, together[0][1].grad)


def test_the_global_rule_scales_all_tensors_alike():
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=0, granularity="global", lambda_rel=1.5)
    fill(parameters, 0)
    clip.step()
    fill(parameters, 0, scale=10.0)
    before = gradients(parameters)
    stats = clip.step()
    assert stats.coef.shape == (1,)
    assert stats.coef.item() == pytest.approx(0.15, rel=1e-5)
    for name, parameter in parameters:
        torch.testing.assert_close(parameter.grad, 0.15 * before[name], rtol=1e-5, atol=0)


def test_gamma_moves_within_its_bounds_and_directions_stay():
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=1, beta=0.95, lambda_rel=1.3)
    fill(parameters, 0)
    clip.step()
    for step in range(1, 80):
        old = clip.gamma.clone()
        fill(parameters, step, scale=10.0 ** (step % 7 - 3))
        before = gradients(parameters)
        clip.step()
        ratio = clip.gamma / old
        assert (ratio >= 0.95 - 1e-6).all()
        assert (ratio <= 1 + 0.05 * 0.3 + 1e-6).all()
        for index, (name, p) in enumerate(parameters):
            assert p.grad.norm() <= 1.3 * old[index] * (1 + 1e-6)
            cosine = (p.grad * before[name]).sum() / (p.grad.norm() * before[name].norm())
            assert cosine == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("spread", "rel", "rate"), [(0.1, 1.05, 0.42), (0.2, 1.05, 0.62), (0.4, 1.05, 0.76), (0.2, 1.5, 0.017)]
)
def test_the_share_of_clipped_steps_is_the_rules_fixed_point(spread, rel, rate):
    noise = torch.Generator().manual_seed(0)
    options = AdaGCOptions(lambda_rel=rel, warmup_steps=0)
    gamma_S, steps, clipped = torch.full((1000,), math.inf), torch.tensor(0), []
    for step in range(700):
        norm_S = torch.exp(spread * torch.randn(1000, generator=noise) - spread**2 / 2)
        out = clip_norms(norm_S, norm_S.norm(), gamma_S, steps, options)
        gamma_S, steps = out.gamma_S, out.steps
        if step >= 500:
            clipped.append((out.coefficient_S < 1).float().mean().item())
    assert sum(clipped) / len(clipped) == pytest.approx(rate, abs=0.02)


def test_zero_gradients_in_warm_up_freeze_nothing():
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=3)
    for step in range(6):
        fill(parameters, step)
        if step < 4:
            parameters[0][1].grad.zero_()
        before = parameters[0][1].grad.clone()
        clip.step()
    assert before.norm() > 0
    assert parameters[0][1].grad.norm() > 0
    assert torch.isfinite(clip.gamma).all()


def test_a_tensor_first_seen_late_is_not_clipped_on_that_step():
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=1, lambda_rel=0.5)
    for step in range(3):
        fill(parameters, step)
        parameters[1][1].grad = None
        clip.step()
    fill(parameters, 3, scale=100.0)
    before = parameters[1][1].grad.clone()
    clip.step()
    assert torch.equal(parameters[1][1].grad, before)
    assert clip.gamma[1] == pytest.approx(before.norm().item())


def test_a_step_without_gradients_does_not_count(caplog):
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=2)
    clip.step()
    assert "no gradient anywhere" in caplog.text
    assert clip.steps == 0
    fill(parameters, 0)
    for _, parameter in parameters:
        parameter.grad.zero_()
    clip.step()
    assert clip.steps == 0
    assert torch.isinf(clip.gamma).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_gradient_that_is_not_finite_becomes_zero_and_touches_nothing_else(poison, warmup, caplog):
    spoilt, sound = named(), named({name: shape for name, shape in SHAPES.items() if name != "matrix"})
    clip, alone = AdaGC(spoilt, warmup_steps=warmup), AdaGC(sound, warmup_steps=warmup)
    for step in range(3):
        fill(spoilt, step)
        for (_, a), (_, b) in zip(spoilt[1:], sound, strict=True):
            b.grad = a.grad.clone()
        spoilt[0][1].grad[2, 1] = poison
        stats = clip.step()
        alone.step()
        assert torch.equal(spoilt[0][1].grad, torch.zeros(4, 3))
        assert stats.coef[0] == 0
        for (_, a), (_, b) in zip(spoilt[1:], sound, strict=True):
            assert torch.equal(a.grad, b.grad)
    assert torch.isinf(clip.gamma[0])
    assert caplog.text.count("not finite") == 1
    assert "matrix" in caplog.text
    assert clip.summary()["nonfinite"] == 3


def test_non_finite_gradients_that_do_not_stop_are_an_error():
    parameters = named()
    clip = AdaGC(parameters, max_consecutive_nonfinite=3)
    for bad in (True, True, False, True, True):
        fill(parameters, 0)
        parameters[1][1].grad[0] = math.nan if bad else 0.5
        clip.step()
    parameters[1][1].grad[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"3 steps in a row \(step 6\).*vector"):
        clip.step()


def test_the_error_policy_changes_nothing_before_it_raises():
    parameters = named()
    clip = AdaGC(parameters, nonfinite="error", warmup_steps=0)
    fill(parameters, 0)
    clip.step()
    fill(parameters, 1, scale=100.0)
    parameters[2][1].grad.fill_(math.nan)
    before, state = gradients(parameters), clip.state_dict()
    with pytest.raises(NonFiniteGradientError, match="scalar"):
        clip.step()
    assert clip.state_dict() == state
    assert all(torch.equal(before[name], p.grad) for name, p in parameters[:2])


def test_norms_of_bfloat16_gradients_accumulate_in_float32():
    parameter = torch.nn.Parameter(torch.zeros(70_000, dtype=torch.bfloat16))
    clip = AdaGC([parameter], warmup_steps=0)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        stats = clip.step()
    assert stats.pre_norm.item() == pytest.approx(math.sqrt(70_000), rel=1e-5)
    assert clip.gamma.dtype == torch.float32
    assert parameter.grad.dtype == torch.bfloat16


def test_gamma_of_bfloat16_gradients_still_moves():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    clip = AdaGC([parameter], warmup_steps=0)
    for step in range(300):
        parameter.grad = torch.full_like(parameter, 0.01 if step == 0 else 1.0)
        clip.step()
    first = float(torch.full((4,), 0.01, dtype=torch.bfloat16).float().norm())
    assert clip.gamma.item() == pytest.approx(first * 1.001**299, rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_experts_are_clipped_as_if_they_were_separate(axis):
    shape = (3, 4, 2) if axis == 0 else (4, 3, 2)
    stack = [
        ("experts.up", torch.nn.Parameter(torch.zeros(shape))),
        ("head", torch.nn.Parameter(torch.zeros(2))),
    ]
    apart = [(f"e{i}", torch.nn.Parameter(torch.zeros(4, 2))) for i in range(3)]
    apart.append(("head", torch.nn.Parameter(torch.zeros(2))))
    clip = AdaGC(stack, stacked={"experts.*": axis}, warmup_steps=2, init="ema")
    plain = AdaGC(apart, warmup_steps=2, init="ema")
    assert clip.names == ("experts.up[0]", "experts.up[1]", "experts.up[2]", "head")
    for step in range(10):
        fill(apart, step)
        if step == 4:
            apart[1][1].grad.zero_()
        if step == 5:
            apart[2][1].grad[0, 0] = math.nan
        stack[0][1].grad = torch.stack([p.grad for _, p in apart[:3]], dim=axis)
        stack[1][1].grad = apart[3][1].grad.clone()
        clip.step()
        plain.step()
        torch.testing.assert_close(stack[0][1].grad, torch.stack([p.grad for _, p in apart[:3]], dim=axis))
        torch.testing.assert_close(clip.gamma, plain.gamma)
    restored = AdaGC(stack, stacked={"experts.*": axis})
    restored.load_state_dict(json.loads(json.dumps(clip.state_dict())))
    assert torch.equal(restored.gamma, clip.gamma)


def test_excluded_tensors_stay_under_global_clipping_or_under_none():
    for mode in ("global", "none"):
        parameters = named()
        clip = AdaGC(parameters, warmup_steps=1, exclude=["vec*"], exclude_mode=mode, lambda_abs=0.5, eps=0.0)
        for step in range(4):
            fill(parameters, step)
            before = gradients(parameters)
            clip.step()
            counted = [g for name, g in before.items() if mode == "global" or name != "vector"]
            total = torch.cat([g.flatten() for g in counted]).norm()
            factor = min(1.0, 0.5 / total.item()) if mode == "global" else 1.0
            torch.testing.assert_close(parameters[1][1].grad, factor * before["vector"])
            if step == 0:
                torch.testing.assert_close(
                    parameters[0][1].grad, min(1.0, 0.5 / total.item()) * before["matrix"]
                )


def test_a_callable_can_exclude():
    parameters = named()
    clip = AdaGC(parameters, exclude=lambda name, p: p.ndim < 2, exclude_mode="none", warmup_steps=0)
    for step in range(3):
        fill(parameters, step, scale=10.0**step)
        before = gradients(parameters)
        clip.step()
    assert torch.equal(parameters[1][1].grad, before["vector"])
    assert not torch.equal(parameters[0][1].grad, before["matrix"])


def test_accumulated_micro_batches_equal_one_batch():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    other = copy.deepcopy(model)
    whole, parts = AdaGC(model, warmup_steps=2), AdaGC(other, warmup_steps=2)
    for _ in range(8):
        batch = torch.randn(8, 6)
        model.zero_grad()
        model(batch).square().mean().backward()
        other.zero_grad()
        for chunk in batch.chunk(4):
            (other(chunk).square().mean() / 4).backward()
        whole.step()
        parts.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_a_saved_state_continues_bit_for_bit_in_another_order():
    parameters = named()
    clip = AdaGC(parameters, warmup_steps=4)
    for step in range(7):
        fill(parameters, step)
        clip.step()
    again = named()
    resumed = AdaGC(dict(reversed(again)).items(), warmup_steps=4)
    resumed.load_state_dict(json.loads(json.dumps(clip.state_dict())))
    for step in range(7, 14):
        fill(parameters, step)
        fill(again, step)
        clip.step()
        resumed.step()
        assert all(torch.equal(p.grad, q.grad) for (_, p), (_, q) in zip(parameters, again, strict=True))
    by_name = dict(zip(resumed.names, resumed.gamma.tolist(), strict=True))
    assert by_name == dict(zip(clip.names, clip.gamma.tolist(), strict=True))


def test_saved_names_do_not_carry_wrappers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    inner = [name for name, _ in model.named_parameters()]
    wrapped = [(f"module._orig_mod.{name}", p) for name, p in model.named_parameters()]
    assert AdaGC(wrapped).state_dict()["names"] == inner


def test_the_rule_compiles_into_one_graph_for_warm_up_and_after():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(clip_norms, backend=counter, fullgraph=True)
    options = AdaGCOptions(warmup_steps=2)
    gamma_S, steps = torch.full((3,), math.inf), torch.tensor(0)
    for step in range(6):
        norm_S = torch.tensor([1.0, 2.0, 0.0]) * (step + 1)
        out = compiled(norm_S, norm_S.norm(), gamma_S, steps, options)
        plain = clip_norms(norm_S, norm_S.norm(), gamma_S, steps, options)
        assert torch.equal(out.coefficient_S, plain.coefficient_S)
        gamma_S, steps = out.gamma_S, out.steps
    assert counter.frame_count == 1


def test_an_accelerator_is_never_waited_for(monkeypatch):
    # Tensors without values: whatever asks for one raises, as it would wait on an accelerator. The watch
    # waits for nothing either, but asks an event that exists on real devices only.
    monkeypatch.setattr(Watch, "look", lambda self, bad_S: None)
    parameters = [(name, p.to("meta")) for name, p in named({**SHAPES, "experts": (2, 3, 4)})]
    clip = AdaGC(parameters, warmup_steps=2, exclude=["vec*"], stacked={"experts": 0})
    for _ in range(4):
        for _, parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        clip.step()


BAD = [
    ({"lambda_rel": 0.0}, "lambda_rel must be > 0, got 0"),
    ({"lambda_rel": math.nan}, "lambda_rel must be > 0, got nan"),
    ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1"),
    ({"lambda_abs": -1.0}, "lambda_abs must be > 0, got -1"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number"),
    ({"init": "mean"}, "init must be one of min, ema, last, got 'mean'"),
    ({"nonfinite": "zeros"}, "did you mean `zero`"),
    ({"lambda_real": 2.0}, "no option `lambda_real`; did you mean `lambda_rel`"),
    ({"exclude": ["norm*"]}, "exclude: `norm\\*` matches no parameter"),
    ({"stacked": {"experts*": 0}}, "stacked: `experts\\*` matches no parameter"),
    ({"exclude": "norm"}, "exclude must be a list of patterns"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_options_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        AdaGC(named(), **fields)


def test_bad_parameters_are_named():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="no parameters"):
        AdaGC([])
    with pytest.raises(InputError, match="the same parameter twice: param_1"):
        AdaGC([parameter, parameter])
    with pytest.raises(InputError, match="the same name twice: a"):
        AdaGC([("a", parameter), ("a", torch.nn.Parameter(torch.zeros(2)))])
    with pytest.raises(InputError, match="no axis 1"):
        AdaGC([("a", torch.nn.Parameter(torch.zeros(3)))], stacked={"a": 1}).step()
    parameter.ds_id = 3
    with pytest.raises(InputError, match="DeepSpeed"):
        AdaGC([parameter]).step()


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"weight: its gradient is sparse.*sparse=False"):
        AdaGC(table).step()


def test_a_state_of_other_tensors_is_refused_unless_asked_for():
    state = AdaGC(named()).state_dict()
    clip = AdaGC(named({"matrix": (4, 3), "bias": (3,)}), warmup_steps=0)
    with pytest.raises(InputError, match="missing tensors: bias; unexpected tensors: scalar, vector"):
        clip.load_state_dict(state)
    with pytest.raises(InputError, match="version must be 1, got 9"):
        clip.load_state_dict({**state, "version": 9})
    clip.load_state_dict({**state, "step": 5, "gamma": [2.0, 3.0, 4.0]}, strict=False)
    assert clip.gamma.tolist() == [2.0, math.inf]
    assert clip.steps == 5


def test_short_runs_and_odd_settings_get_one_warning(caplog):
    AdaGC(named(), total_steps=300)
    AdaGC(named(), lambda_rel=0.9)
    AdaGC(named({"layers.0.experts.up": (2, 3, 4)}))
    assert [
        text in caplog.text for text in ('init="ema"', "lambda_rel 0.9", "stacked={'layers.0.experts.up': 0}")
    ]
    caplog.clear()
    AdaGC(named(), total_steps=300, init="ema")
    AdaGC(named(), total_steps=30_000)
    assert not caplog.records
