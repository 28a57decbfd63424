"""SeWA's mask against brute force, autograd and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from weightsmith.training.averaging import masks
from weightsmith.training.averaging.masks import learn, mask_gradient, mixture, project, relaxed
from weightsmith.training.averaging.options import SeWAOptions


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic:
    """A convex quadratic of the mean of candidates."""

    def __init__(self, num=8, dim=20, seed=0):
        self.candidates = numbers(num, dim, seed=seed)
        root = numbers(dim, dim, seed=seed + 1000)
        self.matrix = root @ root.mT / dim
        self.centre = numbers(dim, seed=seed + 2000)
        self.calls = 0

    def value(self, point):
        off = point - self.centre
        return 0.5 * off @ self.matrix @ off

    def __call__(self, weights):
        self.calls += 1
        point = weights @ self.candidates
        gradient = self.matrix @ (point - self.centre)
        return float(self.value(point)), self.candidates @ gradient

    def ranking(self, number):
        """Losses of all subsets, best first."""
        subsets = itertools.combinations(range(len(self.candidates)), number)
        return sorted(
            (float(self.value(self.candidates[list(subset)].mean(0))), subset) for subset in subsets
        )


def plain_projection(values, total):
    """Nearest point by trying every way to hold entries at 0, at 1, or free, with the sum free or at its
    bound."""
    best, nearest = math.inf, None
    for kinds in itertools.product((0, 1, None), repeat=len(values)):
        free = [i for i, kind in enumerate(kinds) if kind is None]
        fixed = sum(kind for kind in kinds if kind is not None)
        shifts = [0.0]
        if free:
            shifts.append((sum(values[i] for i in free) + fixed - total) / len(free))
        for shift in shifts:
            point = [values[i] - shift if kind is None else float(kind) for i, kind in enumerate(kinds)]
            if min(point) < -1e-12 or max(point) > 1 + 1e-12 or sum(point) > total + 1e-9:
                continue
            distance = sum((a - b) ** 2 for a, b in zip(point, values, strict=True))
            if distance < best - 1e-15:
                best, nearest = distance, point
    return nearest


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("total", [1, 2, 4])
def test_the_projection_is_the_nearest_feasible_point(seed, total):
    values = numbers(5, seed=seed) * 1.5
    expected = torch.tensor(plain_projection(values.tolist(), total), dtype=torch.float64)
    torch.testing.assert_close(project(values, total), expected, rtol=0, atol=1e-9)


def test_the_projection_is_idempotent_keeps_the_order_and_the_sum():
    for seed in range(20):
        values = numbers(30, seed=seed) * 3
        once = project(values, 4)
        torch.testing.assert_close(project(once, 4), once, rtol=0, atol=1e-12)
        assert once.sum() <= 4 + 1e-9
        assert bool((once[values.argsort()].diff() >= 0).all())


def test_one_logistic_number_stands_for_two_gumbel_numbers():
    """Kolmogorov-Smirnov: the relaxed draw has the law of the keep side of a two-class Gumbel-Softmax."""
    size, probability, temperature = 20_000, 0.3, 0.7
    uniform = torch.rand(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.full((size,), math.log(probability / (1 - probability)), dtype=torch.float64)
    ours = relaxed(logits, temperature, uniform[0]).sort().values
    gumbel = -(-uniform[1:].log()).log()
    scores = torch.stack([math.log(probability) + gumbel[0], math.log(1 - probability) + gumbel[1]])
    theirs = (scores / temperature).softmax(0)[0].sort().values
    grid = torch.linspace(0, 1, 500, dtype=torch.float64)
    distance = (torch.searchsorted(ours, grid) - torch.searchsorted(theirs, grid)).abs().max() / size
    assert distance < 1.63 * math.sqrt(2 / size)  # the 1 % point
    # Drawn hard, an entry is kept as often as its probability says.
    assert float((ours > 0.5).double().mean()) == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("normalize", ["sum", "count"])
def test_the_gradient_by_the_mask_equals_autograd_through_the_mixture(normalize):
    problem = Quadratic()
    mask = torch.rand(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    divisor = mask.sum() if normalize == "sum" else 3
    loss = problem.value(mask @ problem.candidates / divisor)
    (expected,) = torch.autograd.grad(loss, mask)
    weights, by = mixture(mask.detach(), 3, normalize)
    value, dots = problem(weights)
    found = mask_gradient(dots, weights, by, normalize)
    assert value == pytest.approx(float(loss.detach()), abs=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    if normalize == "sum":  # scaling the mask changes nothing
        assert float(mask.detach() @ found) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("parameterization", ["prob", "logit"])
def test_an_iteration_equals_autograd_down_to_the_state(parameterization, monkeypatch):
    """The first gradient that Adam sees, through the mask and its logits."""
    problem, seen = Quadratic(), []
    options = SeWAOptions(steps=1, parameterization=parameterization, temperature=(0.6, 0.6), seed=4)
    real = torch.optim.Adam

    class Spy(real):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    learn(problem, 8, 3, options)
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noise = uniform.logit()
    start = torch.full(
        (8,), 3 / 8 if parameterization == "prob" else 0.0, dtype=torch.float64, requires_grad=True
    )
    logits = start.logit() if parameterization == "prob" else start + math.log(3 / 5)
    mask = ((logits + noise) / 0.6).sigmoid()
    problem.value(mask @ problem.candidates / mask.sum()).backward()
    torch.testing.assert_close(seen[0], start.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_on_small_problems_the_choice_is_among_the_best_of_all_subsets():
    hits, regrets = 0, []
    for seed in range(20):
        problem = Quadratic(seed=seed)
        ranking = problem.ranking(3)
        mask = learn(problem, 8, 3, SeWAOptions(mc_samples=4, seed=seed))
        chosen = tuple(mask.top(3))
        losses = [loss for loss, _ in ranking]
        mine = next(loss for loss, subset in ranking if subset == chosen)
        hits += chosen == ranking[0][1]
        regrets.append((mine - losses[0]) / (np.mean(losses) - losses[0]))
    assert hits >= 8
    assert np.mean(regrets) <= 0.2


@pytest.mark.parametrize(
    "changes", [{}, {"parameterization": "logit"}, {"hard": True}, {"mc_samples": 3}, {"normalize": "count"}]
)
def test_far_off_candidates_are_left_out(changes):
    problem = Quadratic(num=12, seed=5)
    problem.candidates = problem.centre + 0.3 * problem.candidates
    bad = [2, 3, 9, 11]
    problem.candidates[bad] += 8 * numbers(4, 20, seed=9)
    mask = learn(problem, 12, 4, SeWAOptions(**changes))
    assert not set(mask.top(4)) & set(bad)


def test_the_sign_of_the_mean_gradient_is_that_of_a_linear_loss():
    """With a fixed divisor E[F] is linear in the probabilities: each slope has the sign of <a, w_i>."""
    slopes = numbers(6, seed=2)
    probabilities = torch.full((6,), 0.5, dtype=torch.float64)
    uniform = torch.rand(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(6, dtype=torch.float64)
    for draw in uniform:
        mask = relaxed(probabilities.logit(), 0.5, draw)
        by_mask = mask_gradient(slopes, mask / 3, 3.0, "count")
        total += by_mask * mask * (1 - mask) / (0.5 * 0.25)
    assert torch.equal(total.sign(), slopes.sign())


def test_permuted_candidates_and_draws_permute_the_result(monkeypatch):
    problem, order = Quadratic(seed=3), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    plain = learn(problem, 8, 3, SeWAOptions(steps=60))
    problem.candidates = problem.candidates[order]
    real = torch.rand
    monkeypatch.setattr(masks.torch, "rand", lambda *a, **k: real(*a, **k)[order])
    permuted = learn(problem, 8, 3, SeWAOptions(steps=60))
    expected = [plain.probabilities[index] for index in order]
    assert permuted.probabilities == pytest.approx(expected, abs=1e-9)


def test_the_same_seed_gives_the_same_mask_and_another_seed_another():
    results = [learn(Quadratic(), 8, 3, SeWAOptions(steps=30, seed=seed)).probabilities for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


def test_leaving_small_entries_out_changes_the_mixture_by_less_than_their_share():
    mask = torch.tensor([0.9, 5e-5, 0.5, 9e-5, 1e-9], dtype=torch.float64)
    candidates = numbers(5, 30)
    exact = mask @ candidates / mask.sum()
    weights, _ = mixture(mask, 2, "sum")
    assert (weights == 0).tolist() == [False, True, False, True, True]
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float((weights @ candidates - exact).norm() / exact.norm()) < 2e-4


def test_of_equal_candidates_the_later_is_kept():
    mask = masks.Mask((0.5, 0.9, 0.5, 0.5), ())
    assert mask.top(2) == [1, 3]


def test_draws_that_are_not_finite_are_left_out():
    problem = Quadratic()

    def sometimes(weights):
        loss, dots = problem(weights)
        return (math.nan, dots) if problem.calls % 3 == 0 else (loss, dots)

    mask = learn(sometimes, 8, 3, SeWAOptions(steps=9))
    assert [math.isnan(value) for value in mask.history] == [False, False, True] * 3
    assert all(math.isfinite(value) for value in mask.probabilities)
