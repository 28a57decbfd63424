"""TeZO, MeZO and LOZO against their equations in float64, their limits, closed forms, and bad input."""

import copy
import logging
import math
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

from weightsmith.errors import InputError
from weightsmith.training import (
    LOZO,
    LOZOMomentum,
    MeZO,
    MeZOAdam,
    MeZOMomentum,
    TeZO,
    TeZOAdam,
    TeZOMomentum,
    TeZOOptions,
    memory_report,
    write_adapter,
)
from weightsmith.training.tezo import pieces as blockwise
from weightsmith.training.tezo.export import changes
from weightsmith.training.tezo.low_rank import CPPiece, LowRankPiece
from weightsmith.training.tezo.noise import ShortNormals, generator, philox
from weightsmith.training.tezo.pieces import BLOCK, DensePiece
from weightsmith.training.tezo.ranks import numeric_rank

FAMILY = {
    "TeZO": (TeZO, {"rank": 3}),
    "TeZO-m": (TeZOMomentum, {"rank": 3}),
    "TeZO-Adam": (TeZOAdam, {"rank": 3}),
    "TeZO-Lion": (TeZO, {"rank": 3, "variant": "lion"}),
    "MeZO": (MeZO, {}),
    "MeZO-m": (MeZOMomentum, {}),
    "MeZO-Adam": (MeZOAdam, {}),
    "LOZO": (LOZO, {"rank": 2, "interval": 3}),
    "LOZO-m": (LOZOMomentum, {"rank": 2, "interval": 3}),
}
every = pytest.mark.parametrize("method", FAMILY)


def small(dtype=torch.float64, seed=0):
    """Named parameters: two matrices, a vector, a stack of experts, a convolution."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 5), "b.weight": (4, 7), "a.bias": (6,), "m.experts": (2, 4, 5), "c": (4, 2, 3)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def loss_of(point):
    return sum((p.double() ** 2).sum() / 2 + torch.sin(2 * p.double()).sum() for p in point.values())


def made(method, point, lr=0.01, **more):
    kind, options = FAMILY[method]
    return kind(point.items(), lr, **options, **more)


def dense_direction(piece, step):
    """The direction as the equations say it, from factors and short vectors."""
    if isinstance(piece, CPPiece):
        piece.turn(step)
        tau = piece.tau(step)
        found = torch.stack(
            [
                sum(t * torch.outer(u, v) for t, u, v in zip(tau[e], piece.u[e].T, piece.v[e].T, strict=True))
                for e in range(len(piece.value))
            ]
        )
        return found * piece.factor
    return piece.direction(step)


def reference(method, start, steps, lr, rho=1e-3, betas=(0.9, 0.99), eps=1e-8, decay=0.0, corrected=True):
    """Every rule with dense tensors, one line of the equations for one line here."""
    optimizer = made(method, start, lr)
    pieces = {piece.name: piece for piece in optimizer.pieces()}
    w = {name: p.detach().clone() for name, p in start.items()}
    b1, b2 = betas
    mean = {name: torch.zeros_like(p) for name, p in w.items()}
    square = {name: torch.zeros_like(p) for name, p in w.items()}
    m = {name: 0.0 for name in w}
    v = {name: 0.0 for name in w}
    for step in range(steps):
        z = {name: dense_direction(piece, step).view(w[name].shape) for name, piece in pieces.items()}
        up = loss_of({name: w[name] + rho * z[name] for name in w})
        down = loss_of({name: w[name] - rho * z[name] for name in w})
        kappa = float(up - down) / (2 * rho)
        low1, low2 = (1 - b1 ** (step + 1), 1 - b2 ** (step + 1)) if corrected else (1.0, 1.0)
        for name, piece in pieces.items():
            if w[name].ndim >= 2:
                w[name] = w[name] * (1 - lr * decay)
            g = kappa * z[name]
            if method.endswith("-m"):
                mean[name] = b1 * mean[name] + (1 - b1) * g
                w[name] = w[name] - lr * mean[name]
            elif method == "TeZO-Lion":
                w[name] = w[name] - lr * (b1 * mean[name] + (1 - b1) * g).sign()
                mean[name] = b2 * mean[name] + (1 - b2) * g
            elif method == "MeZO-Adam" or (method == "TeZO-Adam" and isinstance(piece, DensePiece)):
                mean[name] = b1 * mean[name] + (1 - b1) * g
                square[name] = b2 * square[name] + (1 - b2) * g**2
                w[name] = w[name] - lr * (mean[name] / low1) / ((square[name] / low2).sqrt() + eps)
            elif method == "TeZO-Adam":
                tau = piece.tau(step)
                m[name] = b1 * m[name] + (1 - b1) * kappa * tau
                v[name] = b2 * v[name] + (1 - b2) * (kappa * tau) ** 2
                u_, v_, c = piece.u, piece.v, piece.factor
                whole = c * torch.einsum("emr,er,enr->emn", u_, m[name] / low1, v_)
                parts = c**2 * torch.einsum("emr,er,enr->emn", u_**2, v[name] / low2, v_**2)
                w[name] = w[name] - lr * (whole / (parts.sqrt() + eps)).view(w[name].shape)
            else:
                w[name] = w[name] - lr * g
    return w


@every
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_are_those_of_the_equations(method, decay):
    steps = 3 if method == "LOZO-m" else 8  # its mean is carried over, which is no rule of dense tensors
    point = small()
    expected = reference(method, small(), steps, 0.01, decay=decay)
    optimizer = made(method, point, weight_decay=decay)
    for _ in range(steps):
        optimizer.step(lambda: loss_of(point))
    for name, p in point.items():
        torch.testing.assert_close(p.data, expected[name], rtol=1e-7, atol=1e-8, msg=name)


def test_without_bias_correction_the_first_steps_are_the_papers():
    point = small()
    expected = reference("TeZO-Adam", small(), 5, 0.01, corrected=False)
    optimizer = made("TeZO-Adam", point, bias_correction=False)
    for _ in range(5):
        optimizer.step(lambda: loss_of(point))
    for name, p in point.items():
        torch.testing.assert_close(p.data, expected[name], rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("variant", ["sgd", "momentum"])
def test_tezo_is_mezo_on_the_few_numbers_that_scale_its_factors(variant):
    w = nn.Parameter(small()["a.weight"].detach().clone())
    optimizer = TeZO([("w", w)], 0.02, rank=3, variant=variant)
    piece = optimizer.pieces()[0]
    piece.turn(0)
    base, c, mean = w.detach().clone(), torch.zeros(3, dtype=torch.float64), torch.zeros(3).double()
    u, v = piece.u[0] * piece.factor, piece.v[0]
    for step in range(50):
        tau, rho = piece.tau(step)[0], 1e-3
        ends = [loss_of({"w": base + (u * (c + sign * rho * tau)) @ v.T}) for sign in (1, -1)]
        g = (ends[0] - ends[1]) / (2 * rho) * tau
        mean = 0.9 * mean + 0.1 * g
        c = c - 0.02 * (mean if variant == "momentum" else g)
        optimizer.step(lambda: loss_of({"w": w}))
    torch.testing.assert_close(w.data, base + (u * c) @ v.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(optimizer.state[w]["coefficients"][0], c, rtol=0, atol=1e-10)


def test_a_single_weight_moves_along_the_product_of_three_numbers():
    w = nn.Parameter(torch.tensor([[0.7]], dtype=torch.float64))
    optimizer = TeZO([("w", w)], 0.1, rank=1)
    piece = optimizer.pieces()[0]
    piece.turn(0)
    z = float(piece.u * piece.v * piece.tau(0))
    optimizer.step(lambda: (w**3).sum())
    slope = ((0.7 + 1e-3 * z) ** 3 - (0.7 - 1e-3 * z) ** 3) / 2e-3
    assert w.item() == pytest.approx(0.7 - 0.1 * slope * z, rel=1e-10)


def test_with_one_factor_tezo_adam_is_dense_adam():
    """No cross terms, so the separable square is the square."""
    w, dense = (nn.Parameter(small()["a.weight"].detach().clone()) for _ in range(2))
    optimizer = TeZOAdam([("w", w)], 0.05, rank=1)
    adam = torch.optim.Adam([dense], 0.05, betas=(0.9, 0.99), eps=1e-8)
    for step in range(10):
        direction = dense_direction(optimizer.pieces()[0], step)[0]
        optimizer.step(lambda: loss_of({"w": w}))
        dense.grad = optimizer.last.kappa * direction
        adam.step()
        torch.testing.assert_close(w.data, dense.data, rtol=1e-9, atol=1e-9)


def test_the_mean_square_of_directions_is_the_separable_one():
    w = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    piece = TeZO([("w", w)], 0.1, rank=3).pieces()[0]
    piece.turn(0)
    tau = torch.cat([piece.tau(step) for step in range(20_000)])
    z = torch.einsum("mr,tr,nr->tmn", piece.u[0], tau, piece.v[0]) * piece.factor
    wanted = piece.factor**2 * (piece.u[0] ** 2) @ (piece.v[0] ** 2).T
    assert float((z.square().mean(0) - wanted).norm() / wanted.norm()) < 0.02


def test_over_all_draws_the_estimate_is_the_gradient_with_the_papers_variance():
    """Theorem 1, on a stack of independent matrices."""
    many, m, n, r = 100_000, 5, 7, 3
    w = nn.Parameter(torch.zeros(many, m, n))
    piece = TeZO([("experts", w)], 0.1, rank=r, scale="paper").pieces()[0]
    z = piece.direction(0).double()
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimate = (z * g).sum((1, 2), keepdim=True) * z / r
    assert float((estimate.mean(0) - g).norm() / g.norm()) < 0.1
    delta = 1 + m * n + (2 * m * n + 6 * (m + n) + 10) / r
    measured = float((estimate - g).square().sum((1, 2)).mean() / g.square().sum())
    assert measured == pytest.approx(delta, rel=0.1)


def test_a_unit_direction_has_unit_entries_at_any_rank():
    for rank in (1, 4, 16):
        piece = TeZO([("experts", nn.Parameter(torch.zeros(2000, 16, 16)))], 1.0, rank=rank).pieces()[0]
        assert float(piece.direction(0).square().mean()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("rho", [1e-3, 10.0])
@every
def test_on_a_line_and_a_parabola_the_derivative_is_exact(method, rho):
    point = small()
    noise = torch.Generator().manual_seed(5)
    g = {k: torch.randn(p.shape, generator=noise, dtype=torch.float64) for k, p in point.items()}
    optimizer = made(method, point, lr=0.0, rho=rho)
    z = {p.name: dense_direction(p, 0).view(point[p.name].shape) for p in optimizer.pieces()}
    expected = sum(float((g[k] * z[k]).sum()) for k in g)
    curved = sum(float((point[k].detach() * z[k]).sum()) for k in g)
    assert optimizer.probe(lambda: sum((g[k] * point[k]).sum() for k in g)) == pytest.approx(expected)
    optimizer.step()
    fresh = made(method, point, lr=0.0, rho=rho)
    assert fresh.probe(lambda: sum((p**2).sum() / 2 for p in point.values())) == pytest.approx(curved)


@pytest.mark.parametrize("method", ["TeZO", "TeZO-m", "TeZO-Adam", "LOZO", "LOZO-m"])
def test_the_papers_scale_is_another_unit_of_rho_and_rate(method):
    rank = FAMILY[method][1]["rank"]
    one, other = small(), small()
    for point in (one, other):
        point.pop("a.bias")  # dense, so not scaled
    rate = 1 if method == "TeZO-Adam" else rank
    paper = (
        made(method, one, 0.001, scale="paper", rho=1e-3, eps=1e-12)
        if method == "TeZO-Adam"
        else made(method, one, 0.001, scale="paper", rho=1e-3)
    )
    unit = made(method, other, 0.001 * rate, scale="unit", rho=1e-3 * math.sqrt(rank))
    for _ in range(3):
        paper.step(lambda: loss_of(one))
        unit.step(lambda: loss_of(other))
    for name in one:
        torch.testing.assert_close(one[name].data, other[name].data, rtol=1e-6, atol=1e-7)


@every
def test_one_sweep_that_undoes_and_steps_is_both(method):
    """Probing first puts the weights back, and the step starts from there."""
    fused, apart = small(torch.float32), small(torch.float32)
    one, two = made(method, fused, weight_decay=0.1), made(method, apart, weight_decay=0.1)
    for _ in range(5):
        one.step(lambda: loss_of(fused))
        two.probe(lambda: loss_of(apart))
        two.step()
    for name in fused:
        torch.testing.assert_close(fused[name].data, apart[name].data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["TeZO", "TeZO-m", "TeZO-Adam"])
def test_short_factors_round_no_step_away(method):
    """The undoing of a probe is a hundred times as large as a step, and both are one product."""
    moved = []
    for restore in ("inplace", "snapshot"):
        point, start = small(torch.float32), small(torch.float32)
        train(method, point, 5, lr=1e-5, restore=restore, factor_dtype="bfloat16")
        moved.append({name: (point[name] - start[name]).detach() for name in point})
    for name, step in moved[1].items():
        assert float((moved[0][name] - step).norm() / step.norm()) < 0.02, name


def test_what_short_factors_learn_is_exported_to_the_last_digits():
    point = {"w": nn.Parameter(torch.randn(48, 40, generator=torch.Generator().manual_seed(0)))}
    start = point["w"].detach().clone()
    optimizer = TeZO(point.items(), 1e-4, rank=4, factor_dtype="bfloat16")
    train("TeZO", point, 20, optimizer=optimizer)
    left, right = changes(optimizer)["w"]
    torch.testing.assert_close(point["w"].data, start + left @ right.T, rtol=0, atol=2e-6)


@every
@pytest.mark.parametrize("restore", ["inplace", "snapshot"])
def test_probes_give_the_weights_back(method, restore):
    point = small(torch.float32)
    before = copy.deepcopy(point)
    optimizer = made(method, point, lr=0.0, restore=restore)
    for _ in range(300):
        optimizer.step(lambda: loss_of(point))
    if method == "TeZO-Lion":
        return  # signs times a rate of 0
    for name in point:
        if restore == "snapshot":
            assert torch.equal(point[name], before[name])
        drift = float((point[name] - before[name]).detach().norm() / before[name].detach().norm())
        assert drift < 1e-5


class Text(nn.Module):
    """Tied embeddings, dropout, a norm, and a layer called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.drop(self.body(torch.tanh(self.body(self.embed(ids)))))
        return nn.functional.cross_entropy(self.head(self.norm(hidden)), (ids + 1) % 11)


IDS = torch.arange(33) % 11


@pytest.mark.parametrize("method", ["TeZO", "TeZO-Adam", "LOZO"])
def test_branches_measure_what_moved_weights_measure_and_never_move_them(method):
    kind, options = FAMILY[method]
    moved, still = Text(), Text()
    one = kind(moved.named_parameters(), 0.01, **options)
    two = kind(still.named_parameters(), 0.01, restore="branch", model=still, **options)
    for step in range(5):
        before = {name: p.detach().clone() for name, p in still.named_parameters()}
        torch.manual_seed(step)
        first = one.probe(lambda: moved(IDS))
        torch.manual_seed(step)
        assert two.probe(lambda: still(IDS)) == pytest.approx(first, rel=1e-3, abs=1e-4)
        assert all(torch.equal(p, before[name]) for name, p in still.named_parameters())
        one.step()
        two.step()
    assert not still.body._forward_hooks
    for p, q in zip(moved.parameters(), still.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_branches_leave_alone_what_they_dont_know():
    """Attention reads its projections without calling them."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 4, 8)
    optimizers = [
        TeZO(attention.named_parameters(), 0.0, rank=2, restore=restore, model=attention)
        for restore in ("branch", "inplace")
    ]
    slopes = [o.probe(lambda: attention(x, x, x)[0].square().mean()) for o in optimizers]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3, abs=1e-5)
    assert slopes[0] != 0


class HandTied(Text):
    """Reads the embedding as a head without calling it, and a layer by the name of its argument."""

    def forward(self, ids):
        hidden = self.norm(self.drop(self.body(input=self.embed(input=ids))))
        return nn.functional.cross_entropy(nn.functional.linear(hidden, self.embed.weight), (ids + 1) % 11)


class Fused(Text):
    """Attention whose output projection is a plain layer that never runs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(24, 8))

    def forward(self, ids):
        x = self.embed(ids)[:, None]
        mixed, _ = nn.functional.multi_head_attention_forward(
            *(x, x, x, 8, 2, self.inner, None, None, None, False, 0.4, self.body.weight, self.body.bias),
            training=self.training,
            need_weights=False,
        )
        return nn.functional.cross_entropy(self.head(self.norm(mixed[:, 0])), (ids + 1) % 11)


class Compiled(Text):
    def forward(self, ids):
        return torch.compile(super().forward, backend="eager")(ids)


def compiled_within():
    model = Text()
    model.body.compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [HandTied, Fused, Compiled, compiled_within])
@pytest.mark.parametrize("replay_rng", [True, False])
def test_branches_miss_no_use_of_a_matrix(make, replay_rng):
    slopes = []
    for restore in ("inplace", "branch"):
        model = make().eval() if not replay_rng else make()
        torch.manual_seed(1)
        model(IDS)  # what is compiled, is compiled without hooks
        optimizer = TeZO(
            model.named_parameters(), 0.0, rank=2, model=model, restore=restore, replay_rng=replay_rng
        )
        before = copy.deepcopy(model.state_dict())
        for step in range(2):
            torch.manual_seed(step)
            slopes.append(optimizer.probe(lambda model=model: model(IDS)))
            optimizer.step()
        assert restore == "inplace" or all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert slopes[2:] == pytest.approx(slopes[:2], rel=1e-2, abs=1e-4)
    assert abs(slopes[0]) > 1e-3


def test_an_expert_without_tokens_is_copied_and_a_sound_model_is_not(caplog):
    model = Text()
    model.idle = nn.Linear(8, 8, bias=False)
    calls = []
    for idle in (False, True):
        named = [(n, p) for n, p in model.named_parameters() if idle or "idle" not in n]
        optimizer = TeZO(named, 0.0, rank=2, model=model, restore="branch")
        with caplog.at_level(logging.WARNING):
            optimizer.step(lambda idle=idle: calls.append(idle) or model(IDS))
        branched = {piece.name for piece in optimizer.pieces() if optimizer.is_branched(piece)}
        assert branched == {"embed.weight", "body.weight"}
        assert ("1 matrices are read by more" in caplog.text) == idle
    assert calls.count(False) == 2
    assert not model.body._forward_hooks


def test_tied_embeddings_are_moved_once():
    model = Text().eval()
    optimizer = TeZO(model.named_parameters(), 0.0, rank=2, freeze_1d=True)
    names = [piece.name for piece in optimizer.pieces()]
    assert names == ["embed.weight", "body.weight"]
    direction = {piece.name: piece.direction(0) for piece in optimizer.pieces()}
    losses = []
    optimizer.probe(lambda: losses.append(model(IDS)) or losses[-1])
    with torch.no_grad():
        for name, z in direction.items():
            model.get_parameter(name).add_(z[0], alpha=1e-3)
        by_hand = model(IDS)
    assert float(losses[0]) == pytest.approx(float(by_hand), rel=1e-6)


def test_two_parameters_of_one_storage_are_moved_once():
    w = nn.Parameter(torch.ones(3, 2))
    assert len(TeZO([("a", w), ("b", nn.Parameter(w.data))], 0.1, rank=1).pieces()) == 1


@every
def test_both_probes_see_the_same_dropout(method):
    kind, options = FAMILY[method]
    model = Text()
    optimizer = kind(model.named_parameters(), 0.0, **options)
    torch.manual_seed(3)
    masks = []
    model.drop.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer.step(lambda: model(IDS))
    assert torch.equal(masks[0], masks[1])
    after = torch.rand(1)
    torch.manual_seed(3)
    model(IDS)
    assert torch.equal(torch.rand(1), after)  # as after one pass


def train(method, point, steps, optimizer=None, disturb=False, **more):
    optimizer = optimizer or made(method, point, **more)
    for step in range(steps):
        if disturb:
            torch.manual_seed(step)
            torch.rand(step + 1)
        optimizer.step(lambda: loss_of(point))
    return optimizer


@every
def test_directions_depend_on_seed_and_names_only(method):
    runs = []
    for order, disturb in ((1, False), (-1, True)):
        point = small(torch.float32)
        train(method, dict(list(point.items())[::order]), 4, disturb=disturb, seed=7)
        runs.append(point)
    # The sum of a loss over parameters rounds by their order, so that is kept.
    other = small(torch.float32)
    train(method, other, 4, seed=8)
    assert any(not torch.equal(runs[0][name], other[name]) for name in other)
    state = torch.get_rng_state()
    third = small(torch.float32)
    train(method, third, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    for name in third:
        assert torch.equal(runs[0][name], third[name])
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-5, atol=1e-5)


@every
def test_the_order_of_parameters_changes_no_bit_of_a_direction(method):
    found = []
    for order in (1, -1):
        point = small(torch.float32)
        optimizer = made(method, dict(list(point.items())[::order]))
        found.append({piece.name: piece.direction(4) for piece in optimizer.pieces()})
    for name, direction in found[0].items():
        assert torch.equal(direction, found[1][name])


@every
@pytest.mark.parametrize("save_factors", [False, True])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(method, save_factors, tmp_path):
    more = {"save_factors": save_factors}
    whole, point = small(torch.bfloat16), small(torch.bfloat16)
    train(method, whole, 8, lr=0.05, **more)
    optimizer = train(method, point, 5, lr=0.05, **more)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    has_factors = any("u" in entry for entry in saved["state"].values())
    assert has_factors == (save_factors and method.startswith("TeZO"))
    again = {name: nn.Parameter(p.detach().clone()) for name, p in point.items()}
    resumed = made(method, again, lr=0.3, **more)  # the saved rate counts
    resumed.load_state_dict(saved)
    train(method, again, 3, optimizer=resumed)
    for name in whole:
        assert torch.equal(again[name], whole[name])


def test_a_resumed_run_keeps_the_ranks_it_began_with():
    point = small(torch.float32)
    optimizer = TeZO(point.items(), 0.1, rank="auto")
    optimizer.step(lambda: loss_of(point))
    before = [piece.rank for piece in optimizer.pieces() if isinstance(piece, CPPiece)]
    flat = {name: nn.Parameter(torch.ones_like(p)) for name, p in point.items()}  # of rank one
    resumed = TeZO(flat.items(), 0.1, rank="auto")
    resumed.load_state_dict(optimizer.state_dict())
    assert [piece.rank for piece in resumed.pieces() if isinstance(piece, CPPiece)] == before
    assert max(before) > 1


@every
def test_it_works_in_inference_mode_and_goes_on_outside(method):
    inside, outside = small(torch.float32), small(torch.float32)
    with torch.inference_mode():
        optimizer = train(method, inside, 2)
    train(method, inside, 2, optimizer=optimizer)
    train(method, outside, 4)
    for name in inside:
        assert torch.equal(inside[name], outside[name])


@every
def test_a_loss_that_is_not_finite_leaves_weights_and_state(method):
    point = small(torch.float32)
    optimizer = train(method, point, 4, restore="snapshot")
    before = copy.deepcopy(point)
    state = copy.deepcopy([piece.state for piece in optimizer.pieces()])
    optimizer.step(lambda: loss_of(point) * math.nan)
    assert optimizer.skipped_steps == 1
    assert optimizer.last.skipped
    assert optimizer.step_count == 5  # another direction next time
    for name in point:
        assert torch.equal(point[name], before[name])
    for old, piece in zip(state, optimizer.pieces(), strict=True):
        assert old.keys() == piece.state.keys()
        for key, value in old.items():
            now = piece.state[key]
            assert torch.equal(value, now) if torch.is_tensor(value) else value == now
    optimizer.step(lambda: loss_of(point))
    assert not torch.equal(point["a.weight"], before["a.weight"])


@every
def test_a_closure_that_fails_leaves_the_weights(method):
    point = small(torch.float32)
    optimizer = train(method, point, 1, restore="snapshot")
    before = copy.deepcopy(point)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("broken")
        return loss_of(point)

    with pytest.raises(KeyError):
        optimizer.step(closure)
    for name in point:
        assert torch.equal(point[name], before[name])
    optimizer.step(lambda: loss_of(point))


@every
@pytest.mark.parametrize("restore", ["inplace", "snapshot"])
@pytest.mark.parametrize("sweep", [1, 2, 3])
def test_a_sweep_that_breaks_off_leaves_no_weight_behind(method, restore, sweep, monkeypatch):
    """Out of memory in one piece: while weights move to a probe, to the other, and while they step."""
    point = small(torch.float32)
    optimizer = train(method, point, 1, restore=restore, lr=0.0)
    before = copy.deepcopy(point)
    middle = optimizer.pieces()[2]
    calls = []

    def broken(function):
        def run(*args):
            calls.append(1)
            if len(calls) == sweep:
                raise MemoryError
            return function(*args)

        return run

    for name in ("move", "update"):
        monkeypatch.setattr(middle, name, broken(getattr(middle, name)))
    with pytest.raises(MemoryError):
        optimizer.step(lambda: loss_of(point))
    monkeypatch.undo()
    still = [name for name in point if method != "TeZO-Lion" or sweep < 3]
    for name in still:
        torch.testing.assert_close(point[name], before[name], rtol=0, atol=1e-6)
    optimizer.step(lambda: loss_of(point))
    for name in still:
        torch.testing.assert_close(point[name], before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        ("MeZO", torch.float32, {}),
        ("MeZO-Adam", torch.bfloat16, {"weight_decay": 0.1}),
        # Only factors of another dtype are multiplied block by block.
        ("TeZO", torch.bfloat16, {"factor_dtype": "float32", "weight_decay": 0.1}),
        ("TeZO-Adam", torch.float32, {}),
        ("TeZO-Lion", torch.bfloat16, {"factor_dtype": "float32"}),
    ],
)
def test_memory_that_runs_out_between_two_blocks_leaves_no_weight_at_a_probe(
    method, dtype, options, monkeypatch
):
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    drawn, fails_at = 0, 0

    def failing(blocks):
        def watched(self, *args):
            nonlocal drawn
            for block in blocks(self, *args):
                drawn += 1
                if drawn == fails_at:
                    raise torch.OutOfMemoryError
                yield block

        return watched

    monkeypatch.setattr(DensePiece, "_blocks", failing(DensePiece._blocks))
    monkeypatch.setattr(LowRankPiece, "_rows", failing(LowRankPiece._rows))

    def attempt(at):
        nonlocal drawn, fails_at
        point = small(dtype)
        before = {name: p.detach().clone() for name, p in point.items()}
        # Steps of a thousandth beside probes of two.
        optimizer = made(method, point, lr=1e-3, rho=2.0, clip=0.1, **options)
        optimizer.pieces()
        drawn, fails_at = 0, at
        try:
            optimizer.step(lambda: loss_of(point))
        except torch.OutOfMemoryError:
            assert optimizer.step_count == 0
        moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in point.items()}
        assert max(moved.values()) < 0.1, (at, moved)
        return drawn

    blocks = attempt(0)
    assert blocks > 20
    for at in range(1, blocks + 1):
        assert attempt(at) >= at


@every
@pytest.mark.parametrize("restore", ["inplace", "snapshot"])
@pytest.mark.parametrize("sweep", [1, 2])
def test_control_c_waits_until_it_is_known_where_the_weights_are(method, restore, sweep, monkeypatch):
    point = small(torch.float32)
    optimizer = train(method, point, 1, restore=restore, lr=0.0)
    before = copy.deepcopy(point)
    middle = optimizer.pieces()[2]
    calls, move = [], middle.move

    def move_then_signal(*args):
        move(*args)
        calls.append(1)
        if len(calls) == sweep:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(middle, "move", move_then_signal)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_of(point))
    assert len(calls) >= sweep
    assert signal.getsignal(signal.SIGINT) is handler
    for name in point:
        torch.testing.assert_close(point[name], before[name], rtol=0, atol=1e-6)


def test_a_parameter_moves_as_long_as_it_is_trained():
    point = small(torch.float32)
    point["b.weight"].requires_grad_(False)
    optimizer = train("TeZO", point, 1)
    moves = []
    for frozen, trained in (("a.weight", "b.weight"), ("b.weight", "a.weight")):
        point[frozen].requires_grad_(False)
        point[trained].requires_grad_(True)
        before = copy.deepcopy(point)
        train("TeZO", point, 2, optimizer=optimizer)
        moves.append([torch.equal(point[name], before[name]) for name in (frozen, trained)])
    assert moves == [[True, False], [True, False]]


@every
def test_probes_of_parts_add_up_to_the_whole(method):
    """Micro-batches of unequal size, weighed by it."""
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, parts = ({"w.weight": nn.Parameter(torch.ones(4, 5, dtype=torch.float64))} for _ in range(2))
    one, two = made(method, whole), made(method, parts)
    for _ in range(4):
        one.step(lambda: (data @ whole["w.weight"].T).tanh().mean())
        for rows in (data[:4], data[4:]):
            two.probe(lambda rows=rows: (rows @ parts["w.weight"].T).tanh().mean(), weight=len(rows))
        loss = two.step()
        torch.testing.assert_close(loss.item(), one.last.loss)
    torch.testing.assert_close(whole["w.weight"].data, parts["w.weight"].data, rtol=1e-8, atol=1e-9)


def test_a_metric_without_derivative_can_be_climbed():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x = torch.randn(256, 4)
    labels = (x[:, 0] > 0).long()
    optimizer = MeZO(model.named_parameters(), 0.3, rho=0.1, maximize=True)

    def accuracy():
        return float((model(x).argmax(1) == labels).float().mean())

    first = accuracy()
    for _ in range(150):
        optimizer.step(accuracy)
    assert accuracy() > max(first, 0.9)


def test_state_of_matrices_is_two_short_vectors():
    point = {"a": nn.Parameter(torch.randn(64, 48)), "b": nn.Parameter(torch.randn(64))}
    tezo = train("TeZO-Adam", point, 1, optimizer=TeZOAdam(point.items(), 0.01, rank=8))
    report = memory_report(tezo)
    assert report.vectors == 4 * 2 * 8
    assert report.factors == 4 * 8 * (64 + 48)
    assert report.dense == 4 * 2 * 64
    kept = [v for s in tezo.state.values() for v in s.values() if torch.is_tensor(v)]
    assert sum(4 * value.numel() for value in kept) == report.vectors + report.dense
    assert max(v.numel() for v in (tezo.state[point["a"]][key] for key in ("mean", "square"))) == 8
    dense = train("MeZO-Adam", point, 1, optimizer=MeZOAdam(point.items(), 0.01))
    assert memory_report(dense).dense == memory_report(dense).dense_adam == 8 * (64 * 48 + 64)
    assert report.vectors <= 0.02 * 8 * 64 * 48
    assert "dense Adam" in str(report)


def test_an_update_needs_no_temporary_as_large_as_the_weights():
    """The largest tensor made while stepping, watched by the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.untyped_storage().data_ptr() != home:
                self.largest = max(self.largest, out.numel())
            return out

    w = nn.Parameter(torch.zeros(2048, 512))
    home = w.untyped_storage().data_ptr()
    for optimizer in (TeZOAdam([("w", w)], 0.01, rank=4), MeZO([("w", w)], 0.01)):
        optimizer.step(lambda: 0.0)
        with Watch() as watch:
            optimizer.step(lambda: 1.0)
        assert 0 < watch.largest <= 2 * BLOCK < w.numel()


def test_automatic_ranks_are_the_smallest_numeric_rank_of_a_block():
    def of_rank(m, n, rank, tail=1e-3):
        q = [torch.linalg.qr(torch.randn(size, min(m, n)))[0] for size in (m, n)]
        values = torch.full((min(m, n),), tail)
        values[:rank] = 1.0
        return nn.Parameter((q[0] * values) @ q[1].T)

    torch.manual_seed(0)
    point = {
        "model.layers.0.q.weight": of_rank(20, 16, 6),
        "model.layers.0.up.weight": of_rank(24, 16, 3),
        "model.layers.1.q.weight": of_rank(20, 16, 9),
        "lm_head.weight": of_rank(16, 30, 12),
    }
    optimizer = TeZO(point.items(), 0.1, rank="auto", max_rank=10, min_rank=2)
    assert [piece.rank for piece in optimizer.pieces()] == [3, 3, 9, 10]
    assert numeric_rank(of_rank(20, 16, 1).data, TeZOOptions(rank="auto")) == 1


def test_blocks_of_two_stacks_have_ranks_of_their_own():
    flat, full = torch.outer(torch.ones(8), torch.arange(1.0, 9.0)), torch.eye(8)
    point = {
        "encoder.block.0.q.weight": nn.Parameter(flat.clone()),
        "encoder.block.0.layer.1.up.weight": nn.Parameter(full.clone()),
        "decoder.block.0.q.weight": nn.Parameter(full.clone()),
    }
    optimizer = TeZO(point.items(), 0.1, rank="auto")
    assert [piece.rank for piece in optimizer.pieces()] == [1, 1, 8]


def test_zeros_have_no_say_in_automatic_ranks(caplog):
    torch.manual_seed(0)
    point = {
        "layers.0.lora_A.weight": nn.Parameter(torch.eye(4, 12)),
        "layers.0.lora_B.weight": nn.Parameter(torch.zeros(12, 4)),
        "layers.1.experts": nn.Parameter(torch.stack([torch.zeros(6, 6), torch.eye(6)])),
        "gate.weight": nn.Parameter(torch.zeros(9, 9)),
    }
    with caplog.at_level(logging.WARNING):
        optimizer = TeZO(point.items(), 0.1, rank="auto", max_rank=7)
        assert [piece.rank for piece in optimizer.pieces()] == [4, 4, 6, 7]
    assert "gate.weight and what else is in its block are all zeros" in caplog.text
    assert "lora_B" not in caplog.text


def test_one_pattern_needs_no_brackets():
    point = {"m.moe": nn.Parameter(torch.randn(2, 4, 5)), "e": nn.Parameter(torch.randn(3, 4, 5))}
    optimizer = TeZO(point.items(), 0.1, rank=2, stacked="*moe*")
    assert [piece.value.shape for piece in optimizer.pieces()] == [(2, 4, 5), (1, 3, 20)]


def test_ranks_by_pattern_and_below_the_sides(caplog):
    point = {"a.weight": nn.Parameter(torch.randn(6, 5)), "b.weight": nn.Parameter(torch.randn(4, 7))}
    with caplog.at_level(logging.WARNING):
        optimizer = TeZO(point.items(), 0.1, rank={"a*": 3, "*": 9})
        assert [piece.rank for piece in optimizer.pieces()] == [3, 4]
    assert "b.weight: 4" in caplog.text


@pytest.mark.parametrize("refresh_state", ["reset", "project"])
def test_new_factors_come_in_time_and_take_the_mean_along(refresh_state):
    w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    options = {"rank": 4, "refresh_interval": 3, "refresh_state": refresh_state}
    optimizer = TeZOMomentum([("w", w)], 0.0, **options)
    piece = optimizer.pieces()[0]
    target = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        optimizer.step(lambda: (w * target).sum())
    old = [piece.u[0].clone(), piece.v[0].clone(), piece.state["mean"][0].clone()]
    piece.turn(3)
    assert not torch.equal(piece.u[0], old[0])
    if refresh_state == "reset":
        assert not piece.state["mean"].any()
        return
    # Of all that the new factors can say, the nearest to the old mean.
    span = torch.stack(
        [torch.outer(u, v).flatten() for u, v in zip(piece.u[0].T, piece.v[0].T, strict=True)], 1
    )
    before = ((old[0] * old[2]) @ old[1].T).flatten()
    nearest = torch.linalg.lstsq(span, before[:, None]).solution[:, 0]
    torch.testing.assert_close(piece.state["mean"][0], nearest)


def test_a_mean_is_carried_over_to_the_same_bits_every_time():
    found = set()
    for _ in range(50):
        optimizer = TeZOMomentum(
            [("w", nn.Parameter(torch.zeros(64, 48)))],
            0.0,
            rank=32,
            refresh_interval=1,
            refresh_state="project",
        )
        piece = optimizer.pieces()[0]
        piece.turn(0)
        piece.state["mean"] = torch.linspace(-1, 1, 32)[None]
        piece.turn(1)
        found.add(piece.state["mean"].numpy().tobytes())
    assert len(found) == 1


def test_lozo_keeps_one_factor_for_its_interval_and_carries_the_mean_over():
    w = nn.Parameter(torch.zeros(50, 400, dtype=torch.float64))
    optimizer = LOZOMomentum([("w", w)], 0.0, rank=2, interval=2)
    piece = optimizer.pieces()[0]
    target = torch.randn(50, 400, dtype=torch.float64)
    for _ in range(2):
        optimizer.step(lambda: (w * target).sum())
    kept, mean = piece.v.clone(), piece.state["mean"].clone()
    piece.turn(1)
    assert torch.equal(piece.v, kept)
    piece.turn(2)
    assert not torch.equal(piece.v, kept)
    torch.testing.assert_close(piece.state["mean"], mean @ (kept.mT @ piece.v) / 400)


@pytest.mark.parametrize("kind", ["TeZO", "TeZO-m"])
def test_an_exported_adapter_is_the_trained_model(kind, tmp_path):
    peft = pytest.importorskip("peft")

    class Untied(Text):
        def __init__(self):
            super().__init__()
            self.head.weight = nn.Parameter(self.embed.weight.detach().clone())

    model, base = Untied(), Untied()
    ranks = {"body*": 5, "*": 3}
    optimizer = FAMILY[kind][0](model.named_parameters(), 0.05, rank=ranks, freeze_1d=True)
    for _ in range(6):
        optimizer.step(lambda: model(IDS))
    write_adapter(optimizer, model, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    moved = 0.0
    start = Untied()
    for name, p in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), p, rtol=0, atol=1e-6)
        moved = max(moved, float((p - start.get_parameter(name)).detach().abs().max()))
    assert moved > 1e-3


def test_an_adapter_has_the_ranks_of_its_own_layers_and_needs_no_names(tmp_path):
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)})
            self.fc = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.fc(torch.tanh(self.inner["fc"](x)))

    trained, base = Net(), Net()
    base.load_state_dict(trained.state_dict())
    groups = [{"params": [trained.fc.weight], "rank": 2}, {"params": list(trained.inner.parameters())}]
    optimizer = TeZO(groups, 0.05, rank=3)
    x = torch.randn(16, 8)
    for _ in range(3):
        optimizer.step(lambda: trained(x).square().mean())
    write_adapter(optimizer, trained, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, p in trained.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), p, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="param_0: is no parameter of this model"):
        write_adapter(optimizer, Net(), tmp_path / "other")


def test_what_was_frozen_after_training_is_not_lost_in_an_adapter():
    point = {"a": nn.Parameter(torch.ones(4, 4)), "b": nn.Parameter(torch.ones(4, 4))}
    optimizer = train("TeZO", point, 1, optimizer=TeZO(point.items(), 0.1, rank=2))
    point["a"].requires_grad_(False)
    with pytest.raises(InputError, match="a: was frozen after it was trained"):
        changes(optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: TeZOAdam(m.named_parameters(), freeze_1d=True), "variant `adam`"),
        (lambda m: MeZO(m.named_parameters()), "only the steps of TeZO's"),
        (lambda m: TeZO(m.named_parameters()), "body.bias: is trained and is no matrix"),
        (lambda m: TeZO(m.named_parameters(), freeze_1d=True, weight_decay=0.1), "weight_decay"),
        (lambda m: TeZO(m.named_parameters(), freeze_1d=True, refresh_interval=2), "refresh_interval"),
        (lambda m: TeZO(m.named_parameters(), freeze_1d=True), "embed.weight: is shared by embed and head"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(make, message, tmp_path):
    pytest.importorskip("peft")
    model = Text()
    with pytest.raises(InputError, match=message):
        write_adapter(make(model), model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_only_adapters_of_a_peft_model_move():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        peft.LoraConfig(target_modules=["0", "2"], r=4),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = TeZO(model.named_parameters(), 0.05, rank=8)
    x = torch.randn(32, 8)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    assert {piece.rank for piece in optimizer.pieces()} == {4, 2}


# Random numbers.


def test_philox_gives_the_published_numbers():
    """Known answers of Random123, kat_vectors: philox4x32 10."""
    for counter, key, wanted in (
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        words = philox(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
        assert " ".join(f"{int(word):08x}" for word in words[:, 0]) == wanted


def test_short_vectors_are_gaussian_and_depend_on_nothing_but_seed_name_step():
    one = ShortNormals(["a", "b", "c"], [5, 3, 8], 1)
    other = ShortNormals(["c", "a"], [8, 5], 1)
    a, _, c = one(9)
    assert torch.equal(other(9)[0], c)
    assert torch.equal(other(9)[1], a)
    assert not torch.equal(one(10)[0], a)
    assert not torch.equal(ShortNormals(["a"], [5], 2)(9)[0], a)
    assert torch.equal(ShortNormals(["a"], [3], 1)(9)[0], a[:3])
    many = ShortNormals([f"n{i}" for i in range(100)], [1000] * 100, 0)(2**40)
    numbers = torch.cat(many).double()
    assert abs(numbers.mean()) < 0.02
    for power, moment in ((2, 1.0), (4, 3.0)):
        assert float((numbers**power).mean()) == pytest.approx(moment, rel=0.05)
    corr = torch.corrcoef(torch.stack(many).double()) - torch.eye(100, dtype=torch.float64)
    assert float(corr.abs().max()) < 0.2


def test_no_two_purposes_share_a_generator():
    seeds = {
        generator(torch.device("cpu"), *parts).initial_seed()
        for parts in (
            ("u", 0, "a", 0),
            ("v", 0, "a", 0),
            ("u", 1, "a", 0),
            ("u", 0, "b", 0),
            ("u", 0, "a", 1),
        )
    }
    assert len(seeds) == 5


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: TeZO(p, rank=0), "rank: expected a whole number of at least 1"),
        (lambda p: TeZO(p, rank="best"), "rank: expected"),
        (lambda p: TeZO(p, rank={}), "rank: expected at least one pattern"),
        (lambda p: TeZO(p, rank={"a*": 0}), r"rank: a\*: expected a whole number"),
        (lambda p: TeZO(p, rho=0.0), "rho: expected above 0 and finite, got 0.0"),
        (lambda p: TeZO(p, rho=math.nan), "rho: expected above 0"),
        (lambda p: TeZO(p, betas=(0.9, 1.0)), r"betas: expected two numbers in \[0, 1\)"),
        (lambda p: TeZO(p, betas=0.9), r"betas: expected two numbers in \[0, 1\), got 0.9"),
        (lambda p: TeZOAdam(p, eps=0.0), "eps: expected above 0 and finite, got 0.0"),
        (lambda p: TeZO(p, "a"), "lr: expected at least 0 and finite, got 'a'"),
        (lambda p: TeZO(p, rho=None), "rho: expected above 0 and finite, got None"),
        (lambda p: TeZO(p, seed="x"), "seed: expected a whole number, got 'x'"),
        (lambda p: TeZO(p, -1.0), "lr: expected at least 0 and finite, got -1.0"),
        (lambda p: TeZO(p, weight_decay=-0.1), "weight_decay: expected at least 0"),
        (
            lambda p: TeZO(p, variant="adm"),
            "variant: expected one of sgd, momentum, adam, lion, got 'adm'",
        ),
        (lambda p: MeZO(p, variant="lion"), "variant: expected one of sgd, momentum, adam"),
        (lambda p: MeZO(p, restore="branch"), "restore: expected one of inplace, snapshot"),
        (lambda p: LOZO(p, interval=0), "interval: expected a whole number of at least 1"),
        (lambda p: TeZO(p, clip=0.0), "clip: expected above 0"),
        (lambda p: TeZO(p, scale="papr"), "scale: expected one of unit, paper, got 'papr'; did you mean"),
        (lambda p: TeZO(p, max_rank=2, min_rank=3), "max_rank: expected a whole number of at least min_rank"),
        (lambda p: TeZO(p, factor_dtype="int8"), "factor_dtype: expected one of float32, bfloat16, float16"),
    ],
)
def test_a_value_out_of_range_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make(list(small().items()))


def test_a_pattern_that_matches_nothing_or_not_everything_is_named():
    with pytest.raises(InputError, match="`z\\*` matches no matrix that is trained; the nearest is"):
        TeZO(small().items(), rank={"z*": 2, "*": 3}).pieces()
    with pytest.raises(InputError, match=r"no pattern matches b.weight; end with `'\*': <rank>`"):
        TeZO(small().items(), rank={"a*": 2, "m*": 2, "c": 1}).pieces()


def test_a_step_without_a_closure_says_what_it_needs():
    needs = "needs a closure that returns the loss without calling backward"
    point = small()
    optimizer = TeZO(point.items())
    with pytest.raises(InputError, match=needs):
        optimizer.step()
    with pytest.raises(InputError, match=needs):
        optimizer.probe(None)
    before = copy.deepcopy(point)

    def with_backward():
        loss = loss_of(point)
        loss.backward()
        return loss

    with pytest.raises(InputError, match=needs):
        optimizer.step(with_backward)
    for name in point:
        torch.testing.assert_close(point[name], before[name])
    optimizer.probe(lambda: loss_of(point))
    with pytest.raises(InputError, match=r"step\(closure\) after probe\(\)"):
        optimizer.step(lambda: loss_of(point))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: torch.ones(3), r"must be one number, got shape \(3,\)"),
        (lambda: None, "a number or a tensor with one; got NoneType"),
        (lambda: "low", "got str"),
    ],
)
def test_a_loss_that_is_no_number_is_named(loss, message):
    with pytest.raises(InputError, match=message):
        TeZO(small().items()).step(loss)


@pytest.mark.parametrize("loss", [np.float32(1.5), np.int64(2), np.array(1.5)], ids=str)
def test_a_loss_can_be_a_number_of_numpy(loss):
    optimizer = TeZO(small().items())
    optimizer.step(lambda: loss)
    assert optimizer.last.loss == float(loss)


def test_a_weight_of_a_batch_must_be_positive():
    with pytest.raises(InputError, match="weight: expected above 0"):
        TeZO(small().items()).probe(lambda: 1.0, weight=0.0)


def test_parameters_that_cannot_move_are_named():
    turning = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"TeZO: q.weight is torch.complex64: probes move floating-point"):
        TeZO([("q.weight", turning)])
    flat = nn.Parameter(torch.ones(4))
    flat.ds_id = 1
    with pytest.raises(
        InputError, match=r"w: FSDP1 and DeepSpeed keep parts of flattened parameters.*fully_shard"
    ):
        TeZO([("w", flat)])
    with pytest.raises(InputError, match="no parameter is trained"):
        TeZO([("w", nn.Parameter(torch.ones(2, 2), requires_grad=False))])
    with pytest.raises(InputError, match="no parameter is trained"):
        TeZO([("b", nn.Parameter(torch.ones(2)))], freeze_1d=True)


def test_a_frozen_base_of_whole_numbers_is_let_be():
    numbers = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    numbers.ds_id = 1
    adapter = nn.Parameter(torch.ones(2, 2))
    optimizer = TeZO([("q.weight", numbers), ("q.lora", adapter)], 0.1, rank=1)
    optimizer.step(lambda: (numbers + adapter).square().sum())
    assert [piece.name for piece in optimizer.pieces()] == ["q.lora"]
    assert not torch.equal(adapter, torch.ones(2, 2))


def test_branches_need_the_model():
    with pytest.raises(InputError, match=r'restore="branch" adds to .*: give it `model=model`'):
        TeZO(small().items(), restore="branch").step(lambda: 1.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda p: TeZO(p, 0.01, rank=2),
            r"a.weight, shape \[6, 5\]: the saved state has rank 3, here it is 2",
        ),
        (lambda p: TeZOAdam(p, 0.01, rank=3), "variant: the saved state has 'sgd', here it is 'adam'"),
        (lambda p: TeZO(p, 0.01, rank=3, scale="paper"), "scale: the saved state has 'unit', here it is"),
        (lambda p: TeZO(p, 0.01, rank=3, refresh_interval=4), "refresh_interval: the saved state has None"),
        (lambda p: TeZO(p, 0.01, rank=3, stacked="c"), r"stacked: the saved state has \['\*expert\*'\]"),
        (lambda p: MeZO(p, 0.01), "MeZO: the saved state is of `tezo`, this is `mezo`"),
        (lambda p: LOZO(p, 0.01, rank=3), "the saved state is of `tezo`, this is `lozo`"),
        (lambda p: TeZO([w for _, w in p], 0.01, rank=3), "param_0: the saved state has a.weight in its"),
        (lambda p: TeZO(list(p)[:3], 0.01, rank=3), "has 5 parameters, here there are 3"),
    ],
)
def test_a_state_of_another_run_is_refused(other, message):
    saved = train("TeZO", small(), 1).state_dict()
    optimizer = other(small().items())
    before = optimizer.state_dict()
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before


@every
@pytest.mark.parametrize(("name", "shape"), [("a.bias", (3,)), ("a.weight", (5, 5))])
def test_a_state_of_other_shapes_is_refused(method, name, shape):
    saved = train(method, small(), 1).state_dict()
    other = {**small(), name: nn.Parameter(torch.ones(shape, dtype=torch.float64))}
    was = re.escape(str(list(small()[name].shape)))
    with pytest.raises(InputError, match=f"{name}: the saved state has shape {was}, here"):
        made(method, other).load_state_dict(saved)


def test_a_state_of_another_family_is_refused():
    point = small()
    adam = torch.optim.AdamW(point.values(), 0.01)
    loss_of(point).backward()
    adam.step()
    with pytest.raises(InputError, match="MeZOAdam: the saved state is not of this family"):
        MeZOAdam(point.items(), 0.01).load_state_dict(adam.state_dict())


def test_a_loaded_run_counts_on_and_forgets_probes_of_the_run_before():
    whole, point = small(), small()
    runs = [train("TeZO", whole, 1), train("TeZO", point, 1)]
    for run in runs:
        run.step(lambda: math.nan)
    runs[1].probe(lambda: 1e6 * loss_of(point))
    other = made("TeZO", point)
    for run in (runs[1], other):
        run.load_state_dict(runs[0].state_dict())
        assert run.skipped_steps == 1
    train("TeZO", whole, 1, optimizer=runs[0])
    train("TeZO", point, 1, optimizer=runs[1])
    for name in whole:
        torch.testing.assert_close(point[name], whole[name])


def test_an_optimizer_is_not_copied_without_its_model():
    with pytest.raises(InputError, match="TeZO: can't be copied or pickled"):
        copy.deepcopy(made("TeZO", small()))


def test_what_is_hardly_meant_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        TeZO([("b", nn.Parameter(torch.ones(3)))])
        optimizer = made("TeZO", small())
        for _ in range(12):
            optimizer.step(lambda: 1.0)
        large = {"w": nn.Parameter(torch.full((4, 4), 100.0, dtype=torch.bfloat16))}
        TeZO(large.items(), rank=1).pieces()
        wide = {"w": nn.Parameter(torch.full((4, 4), 1e9))}
        TeZO(wide.items(), rank=2, scale="paper").pieces()
        dropping = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        for _ in range(2):
            other = TeZO(dropping.named_parameters(), rank=1)
            other.attach(dropping.eval())
            other.pieces()
        other = TeZO(dropping.named_parameters(), rank=1)
        other.attach(dropping.train())
        for _ in range(2):
            other.step(lambda: dropping(torch.ones(1, 4)).sum())
        graph = small()
        optimizer = made("TeZO", graph)

        def closure():
            with torch.enable_grad():
                return loss_of(graph)

        for _ in range(2):
            optimizer.step(closure)
    for words in (
        "no matrix is trained, so this is MeZO",
        "the same to the bit for 10 steps; try rho=0.01",
        "rho=0.001 is lost in the rounding of w (torch.bfloat16, about 1e+02); try rho=0.8",
        "rho=0.001 is lost in the rounding of w (torch.float32, about 1e+09); try rho=8e+01 (told once)",
        "1 drops out: both probes of a step drop the same with replay_rng",
        "builds a graph for gradients that nothing uses",
    ):
        assert caplog.text.count(words) == 1, words


def test_groups_have_their_own_rates_and_schedulers_work():
    point = small(torch.float32)
    groups = [
        {"params": [("a.weight", point["a.weight"])], "lr": 0.0},
        {"params": [("b.weight", point["b.weight"])], "rho": 1e-2},
    ]
    optimizer = TeZO(groups, 0.1, rank=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    before = copy.deepcopy(point)
    both = {name: point[name] for name in ("a.weight", "b.weight")}
    optimizer.step(lambda: loss_of(both))
    assert not torch.equal(point["b.weight"], before["b.weight"])
    torch.testing.assert_close(point["a.weight"], before["a.weight"])
    scheduler.step()
    before = copy.deepcopy(point)
    optimizer.step(lambda: loss_of(both))
    torch.testing.assert_close(point["b.weight"], before["b.weight"])


def test_groups_have_their_own_ranks():
    point = small(torch.float32)
    groups = [
        {"params": [("a.weight", point["a.weight"])], "rank": 1},
        {"params": [("b.weight", point["b.weight"])], "rank": {"b*": 2}},
        {"params": [("m.experts", point["m.experts"]), ("c", point["c"])]},
    ]
    for kind in (TeZO, LOZO):
        point_groups = groups if kind is TeZO else groups[:1] + groups[2:]
        optimizer = kind(point_groups, 0.1, rank=3)
        wanted = {"a.weight": 1, "b.weight": 2, "m.experts": 3, "c": 3}
        for piece in optimizer.pieces():
            assert piece.rank == wanted[piece.name]
            left, right = piece.product(0, 1.0)
            assert left.shape[-1] == right.shape[-1] == wanted[piece.name]
    saved = TeZO(groups, 0.1, rank=3)
    train("TeZO", point, 1, optimizer=saved)
    TeZO(groups, 0.1, rank=3).load_state_dict(saved.state_dict())
    with pytest.raises(InputError, match=r"a.weight, .* rank 1, here it is 2"):
        TeZO([{**groups[0], "rank": 2}, *groups[1:]], 0.1).load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (TeZO, {"rnk": 2}, "rnk: groups have no such key, expected lr, .* or rank; did you mean `rank`"),
        (MeZO, {"rank": 2}, "MeZO: parameter group 1: rank: groups have no such key, expected lr, rho or"),
        (TeZO, {"seed": 2}, "seed: groups have no such key"),
        (TeZO, {"rank": 0}, "TeZO: parameter group 1: rank: expected a whole number of at least 1"),
        (LOZO, {"rank": "auto"}, "rank: expected a whole number of at least 1, got 'auto'"),
        (TeZO, {"rho": 0}, "rho: expected above 0 and finite, got 0"),
        (TeZO, {"rho": -1e-3}, "rho: expected above 0 and finite"),
        (TeZO, {"lr": -1.0}, "lr: expected at least 0 and finite"),
        (TeZO, {"weight_decay": -1.0}, "weight_decay: expected at least 0"),
    ],
)
def test_what_a_group_cannot_have_is_named(kind, more, message):
    point = small()
    groups = [
        {"params": [("a.weight", point["a.weight"])]},
        {"params": [("b.weight", point["b.weight"])], **more},
    ]
    with pytest.raises(InputError, match=message):
        kind(groups)
    late = kind(groups[:1])
    with pytest.raises(InputError, match=message):
        late.add_param_group(groups[1])


def test_a_rho_that_becomes_nothing_is_named_before_anything_moves():
    point = small()
    optimizer = train("TeZO", point, 1)
    before = copy.deepcopy(point)
    optimizer.param_groups[0]["rho"] = 0.0
    with pytest.raises(InputError, match="rho: expected above 0"):
        optimizer.step(lambda: loss_of(point))
    assert all(torch.equal(point[name], before[name]) for name in point)


def test_a_group_that_comes_later_goes_on_at_the_same_step():
    point = small(torch.float32)
    optimizer = TeZO([("a.weight", point["a.weight"])], 0.1, rank=2)
    for _ in range(3):
        optimizer.step(lambda: loss_of(point))
    optimizer.add_param_group({"params": [("b.weight", point["b.weight"])]})
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert [piece.name for piece in optimizer.pieces()] == ["a.weight", "b.weight"]


def test_a_clipped_derivative_bounds_the_step():
    free, bound = small(), small()
    one = made("TeZO", free, 0.01)
    one.step(lambda: loss_of(free))
    limit = abs(one.last.kappa) / 4
    two = made("TeZO", bound, 0.01, clip=limit)
    two.step(lambda: loss_of(bound))
    start = small()
    for name in start:
        torch.testing.assert_close((bound[name] - start[name]) * 4, free[name] - start[name])


def test_weights_that_move_elsewhere_are_followed():
    point = small(torch.float32)
    optimizer = made("TeZO", point)
    optimizer.step(lambda: loss_of(point))
    for p in point.values():
        p.data = p.data.clone()
    before = copy.deepcopy(point)
    optimizer.step(lambda: loss_of(point))
    assert not torch.equal(point["a.weight"], before["a.weight"])
