"""AdaGC tied to optimisers: attached, inside AdamW's kernel, with loss scaling, saved and resumed."""

import copy
import json
import math

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training.adagc.adamw import AdaGCAdamW
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.adagc.scaling import scale_on_device, scale_on_host
from weightsmith.training.adagc.watch import NonFiniteGradientError
from weightsmith.training.sharded import Slots

CLIP = {"warmup_steps": 3, "beta": 0.9}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def loss(model, step):
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    # Every fourth batch is fifty times too large, so that something is always clipped.
    return (model(batch).square().mean() * (50.0 if step % 4 == 3 else 1.0)).float()


def train(model, optimizer, steps, clip=None):
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        if clip is not None:
            clip.step()
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b, **tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_attached_clipping_is_a_call_before_every_step(cls):
    by_hand, by_hook = make_model(), make_model()
    first, second = cls(by_hand.parameters(), lr=0.05), cls(by_hook.parameters(), lr=0.05)
    attached = AdaGC(by_hook, **CLIP)
    attached.attach(second)
    train(by_hand, first, range(12), AdaGC(by_hand, **CLIP))
    train(by_hook, second, range(12))
    assert same(by_hand, by_hook)
    assert attached.steps == 12
    assert attached.summary()["clip_rate"] > 0


def test_the_attached_state_travels_with_the_optimisers_and_continues_bit_for_bit():
    model = make_model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.05)
    AdaGC(optimizer, **CLIP).attach(optimizer)
    train(model, optimizer, range(8))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["adagc"]["step"] == 8
    assert "adagc" not in optimizer.param_groups[0]
    assert all("gamma" not in entry for entry in saved["state"].values())
    train(model, optimizer, range(8, 16))

    again = make_model()
    again.load_state_dict(weights)
    resumed = torch.optim.AdamW(again.named_parameters(), lr=0.05)
    AdaGC(resumed, **CLIP).attach(resumed)
    resumed.load_state_dict(saved)
    train(again, resumed, range(8, 16))
    assert same(model, again)


def test_bfloat16_weights_leave_the_saved_running_means_in_float32():
    model = make_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    clip = AdaGC(model, **CLIP)
    clip.attach(optimizer)
    train(model, optimizer, range(5))
    gamma = clip.gamma.clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(clip.gamma, gamma)
    assert clip.gamma.dtype == torch.float32


def test_a_state_without_clipping_loads_with_a_warning(caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = optimizer.state_dict()
    AdaGC(model).attach(optimizer)
    optimizer.load_state_dict(saved)
    assert "has none of the clipper's" in caplog.text


def test_groups_added_later_are_clipped_from_their_first_gradient():
    model, head = make_model(), torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    clip = AdaGC(optimizer, **CLIP)
    clip.attach(optimizer)
    train(model, optimizer, range(5))
    known = clip.gamma.clone()
    optimizer.add_param_group({"params": [(f"head.{n}", p) for n, p in head.named_parameters()]})
    optimizer.zero_grad()
    head(model(torch.ones(2, 5))).sum().backward()
    optimizer.step()
    assert clip.names[-2:] == ("head.weight", "head.bias")
    assert clip.steps == 6
    assert torch.isfinite(clip.gamma).all()
    assert ((clip.gamma[:4] / known) >= 0.9 - 1e-6).all()


def test_misuse_of_attach_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with AdaGC(model).attach(optimizer):
        with pytest.raises(InputError, match=r"step\(closure\)"):
            optimizer.step(lambda: loss(model, 0))
        with pytest.raises(InputError, match=r"step\(closure\)"):
            optimizer.step(closure=lambda: loss(model, 0))
        with pytest.raises(InputError, match="has an AdaGC already"):
            AdaGC(model).attach(optimizer)
    optimizer.step(lambda: loss(model, 0))
    with pytest.raises(InputError, match=r"needs a torch\.optim\.Optimizer, got Sequential"):
        AdaGC(model).attach(model)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw_with_clipping_inside_equals_clipping_before_it(dtype, amsgrad):
    apart, inside = make_model(dtype), make_model(dtype)
    plain = torch.optim.AdamW(apart.parameters(), lr=0.02, weight_decay=0.1, fused=True, amsgrad=amsgrad)
    fused = AdaGCAdamW(inside.named_parameters(), lr=0.02, weight_decay=0.1, clip=CLIP, amsgrad=amsgrad)
    clip = AdaGC(apart, **CLIP)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 1e-6}
    for step in range(12):
        train(apart, plain, [step], clip)
        train(inside, fused, [step])
        close(apart, inside, **tolerance)
        for p, q in zip(apart.parameters(), inside.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **tolerance)
    assert 0 < fused.clip.summary()["clip_rate"] < 1


def test_adamw_with_clipping_inside_never_clipping_is_torchs_adamw_bit_for_bit():
    ours, theirs = make_model(), make_model()
    train(ours, AdaGCAdamW(ours.parameters(), clip={"lambda_rel": math.inf, "warmup_steps": 0}), range(10))
    train(theirs, torch.optim.AdamW(theirs.parameters(), fused=True), range(10))
    assert same(ours, theirs)


def test_adamw_without_the_fused_kernel_clips_too():
    ours, theirs = make_model(), make_model()
    train(ours, AdaGCAdamW(ours.parameters(), clip=CLIP, fused=False), range(10))
    train(theirs, torch.optim.AdamW(theirs.parameters()), range(10), AdaGC(theirs, **CLIP))
    assert same(ours, theirs)


def test_adamw_with_clipping_inside_handles_stacks_groups_and_poison():
    def build():
        torch.manual_seed(1)
        return torch.nn.ParameterDict(
            {
                name: torch.nn.Parameter(torch.randn(shape))
                for name, shape in {"e": (3, 2, 2), "a": (4,), "b": (2,)}.items()
            }
        )

    apart, inside = build(), build()
    groups = [
        [{"params": [("e", m["e"]), ("a", m["a"])]}, {"params": [("b", m["b"])], "lr": 0.1}]
        for m in (apart, inside)
    ]
    options = {**CLIP, "stacked": {"e": 0}}
    plain, fused = torch.optim.AdamW(groups[0], fused=True), AdaGCAdamW(groups[1], clip=options)
    clip = AdaGC(plain, options)
    for step in range(12):
        noise = torch.Generator().manual_seed(step)
        for name in ("e", "a", "b"):
            gradient = torch.randn(apart[name].shape, generator=noise) * 10.0 ** (step % 3)
            if step == 7 and name != "b":
                gradient.view(-1)[0] = math.nan
            apart[name].grad, inside[name].grad = gradient.clone(), gradient.clone()
        clip.step()
        plain.step()
        fused.step()
        close(apart, inside, rtol=1e-5, atol=1e-6)


def test_adamw_with_clipping_inside_runs_a_closure_and_takes_new_groups():
    model = make_model()
    optimizer = AdaGCAdamW(model.named_parameters(), clip=CLIP)

    def closure():
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value

    assert optimizer.step(closure).item() == pytest.approx(loss(make_model(), 0).item())
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("extra", extra)]})
    extra.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.clip.names[-1] == "extra"
    assert (extra < 1).all()


@pytest.mark.parametrize("fused", [None, False])
def test_adamw_with_clipping_inside_resumes_bit_for_bit(fused):
    model = make_model()
    optimizer = AdaGCAdamW(model.named_parameters(), lr=0.05, clip=CLIP, fused=fused)
    train(model, optimizer, range(7))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    json.dumps(saved["param_groups"][0]["adagc"])
    train(model, optimizer, range(7, 14))
    again = make_model()
    again.load_state_dict(weights)
    resumed = AdaGCAdamW(again.named_parameters(), lr=0.05, clip=CLIP, fused=fused)
    resumed.load_state_dict(saved)
    train(again, resumed, range(7, 14))
    assert same(model, again)


def scaled_run(make, steps, overflow_at=()):
    """Train with a loss scaler; a batch of infinite loss at some steps makes it skip them."""
    model = make_model()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=0.5)
    for step in steps:
        optimizer.zero_grad()
        factor = math.inf if step in overflow_at else 1.0
        scaler.scale(loss(model, step) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


def attached(model, fused):
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.05, fused=fused)
    optimizer.held = AdaGC(optimizer, **CLIP)
    optimizer.held.attach(optimizer)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda model: attached(model, fused=True),
        lambda model: attached(model, fused=False),
        lambda model: AdaGCAdamW(model.named_parameters(), lr=0.05, clip=CLIP),
    ],
    ids=["attached to fused", "attached", "inside"],
)
def test_loss_scaling_changes_nothing_and_skipped_steps_leave_no_trace(make):
    plain = make_model()
    train(plain, make(plain), range(10))
    scaled, optimizer = scaled_run(make, range(10))
    close(plain, scaled, rtol=1e-5, atol=1e-6)
    # Two infinite batches in between: the scaler drops them, and the clipper must not have counted them.
    skipping, optimizer = scaled_run(make, [0, 1, 100, 2, 3, 4, 101, 5, 6, 7, 8, 9], overflow_at=(100, 101))
    close(plain, skipping, rtol=1e-5, atol=1e-6)
    clip = optimizer.clip if hasattr(optimizer, "clip") else optimizer.held
    assert clip.steps == 10
    assert clip.summary()["nonfinite"] == 0


def test_non_finite_gradients_reach_no_moment():
    model = make_model()
    optimizer = AdaGCAdamW(model.named_parameters(), clip={**CLIP, "max_consecutive_nonfinite": 2})
    train(model, optimizer, range(4))
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    model[0].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"0\.weight"):
        optimizer.step()


def test_scaling_on_a_device_is_scaling_on_the_host():
    slots = [Slots(0, 1, None, 0, 1), Slots(1, 3, 0, 0, 3), Slots(4, 1, None, 0, 1)]
    factor_S = torch.tensor([0.5, 1.0, 0.25, 0.0, 1.0])
    bad_S = torch.tensor([False, False, False, True, False])
    host = [torch.ones(4), torch.ones(3, 2), torch.ones(2)]
    host[1][2, 0] = math.nan
    device = [tensor.clone() for tensor in host]
    scale_on_host(list(zip(host, slots, strict=True)), factor_S, bad_S)
    from torch._dynamo.testing import CompileCounter

    factors = [factor_S[0], factor_S[1:4].view(3, 1), factor_S[4]]
    empty = [bad_S[0], bad_S[1:4].view(3, 1), bad_S[4]]
    counter = CompileCounter()
    torch.compile(scale_on_device, backend=counter, fullgraph=True)(device, factors, empty)
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(host, device, strict=True))
    assert device[1].tolist() == [[1.0, 1.0], [0.25, 0.25], [0.0, 0.0]]


def test_hooks_run_once_a_step_although_plain_adamw_has_hooks_too():
    weight = torch.nn.Parameter(torch.ones(3))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # from here on torch wraps AdamW.step
    optimizer = AdaGCAdamW([weight], fused=False)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before", "after"]
