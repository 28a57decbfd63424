"""The router: sure where it may be, a blend where it can't, and a warning where it has never been."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging.mediator.options import RouterConfig
from weightsmith.merging.mediator.router import (
    Router,
    _turns,
    blend,
    fit_router,
    fit_temperature,
    nll,
    uncertainty,
)

CORNERS = {"math": (4, 0, 0), "code": (0, 4, 0), "law": (0, 0, 4)}


def prompts(number=60, spread=0.3, seed=0, extra=0):
    rng = np.random.default_rng(seed)
    found = {}
    for task, corner in CORNERS.items():
        rows = np.array(corner) + spread * rng.standard_normal((number, 3))
        found[task] = np.hstack([rows, rng.standard_normal((number, extra))])
    return found


@pytest.mark.parametrize("hidden", [0, 16])
def test_tasks_apart_are_told_apart_without_doubt(hidden):
    router = fit_router(prompts(), RouterConfig(hidden=hidden))
    for task, rows in prompts(seed=1).items():
        decisions = router.decide(rows)
        assert [decision.task for decision in decisions] == [task] * len(rows)
        inside = [decision for decision in decisions if not decision.ood]
        assert len(inside) > 0.9 * len(rows)
        assert all(decision.branch == "single" for decision in inside)
        assert max(decision.uncertainty for decision in inside) < 0.05
        assert all(max(decision.weights) == 1.0 == sum(decision.weights) for decision in inside)


def test_halfway_between_two_tasks_both_answer():
    mirrored = {
        "left": np.array([[-3.0], [-1.0], [1.0]] * 10),
        "right": np.array([[3.0], [1.0], [-1.0]] * 10),
    }
    router = fit_router(mirrored, RouterConfig())
    halfway = (router.means[0] + router.means[1]) / 2 * router.scale + router.centre
    (decision,) = router.decide(halfway)
    assert decision.branch == "blend"
    assert decision.weights == pytest.approx((0.5, 0.5), abs=0.03)
    assert decision.uncertainty == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("ood", "weights"), [("prior", (1 / 3, 1 / 3, 1 / 3)), ("dense", (0.0, 0.0, 0.0)), ("p", (1.0, 0.0, 0.0))]
)
def test_a_point_far_from_all_tasks_is_known_to_be(ood, weights):
    router = fit_router(prompts(), RouterConfig(ood=ood))
    (decision,) = router.decide(np.array([[60.0, 0, 0]]))
    assert decision.ood
    assert decision.branch == "ood"
    assert decision.weights == pytest.approx(weights)


def test_prompts_that_were_never_seen_are_rarely_called_unlike_even_with_more_features_than_prompts():
    router = fit_router(prompts(20, extra=100), RouterConfig())
    others = np.concatenate(list(prompts(200, seed=5, extra=100).values()))
    assert (router.distances(others) > router.threshold).mean() < 0.1


def test_the_distance_is_mahalanobis_with_a_shrunk_covariance():
    found = prompts(50, extra=2)
    router = fit_router(found, RouterConfig(shrinkage=0.2))
    z = {task: (rows - router.centre) / router.scale for task, rows in found.items()}
    within = np.concatenate([rows - rows.mean(axis=0) for rows in z.values()])
    covariance = within.T @ within / len(within)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 5 * np.eye(5)
    point = np.array([1.0, 2.0, 0.5, -1.0, 0.3])
    at = (point - router.centre) / router.scale
    slow = min(
        np.sqrt((at - rows.mean(axis=0)) @ np.linalg.inv(covariance) @ (at - rows.mean(axis=0)))
        for rows in z.values()
    )
    assert router.distances(point[None])[0] == pytest.approx(slow)


def test_the_temperature_lowers_the_loss_on_held_out_prompts_and_nothing_near_it_does_better():
    rng = np.random.default_rng(0)
    logits = 6 * rng.standard_normal((300, 3))
    labels = np.where(rng.random(300) < 0.7, logits.argmax(axis=1), rng.integers(0, 3, 300))
    best = fit_temperature(logits, labels)
    assert best > 1
    assert nll(logits, labels, best) < nll(logits, labels, 1.0)
    assert nll(logits, labels, best) <= min(nll(logits, labels, best * f) for f in (0.97, 1.03))
    assert (
        fit_router(prompts(spread=2.5), RouterConfig()).report["nll"]
        <= fit_router(prompts(spread=2.5), RouterConfig()).report["nll_before"]
    )


def test_the_classifier_is_at_the_minimum_of_its_loss():
    """The gradient of cross-entropy plus penalty, written out, vanishes."""
    found = prompts(40, spread=2.0)
    router = fit_router(found, RouterConfig(l2=0.05, iterations=400), seed=3)
    x, y = np.concatenate(list(found.values())), np.repeat(np.arange(3), 40)
    train = _turns(y, list(found), 3) % 5 != 4
    z = (x[train] - router.centre) / router.scale
    weight, bias = router.layers
    logits = z @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = p - np.eye(3)[y[train]]
    np.testing.assert_allclose(error.T @ z / len(z) + 0.05 * weight, 0, atol=1e-5)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-5)


def test_the_order_of_the_tasks_only_orders_the_weights():
    found = prompts(spread=2.0)
    turned = {task: found[task] for task in ("law", "math", "code")}
    one = fit_router(found, RouterConfig(ood_quantile=1.0))
    other = fit_router(turned, RouterConfig(ood_quantile=1.0))
    point = np.array([[1.5, 1.4, 0.2]])
    first = dict(zip(one.tasks, one.probabilities(point)[0], strict=True))
    second = dict(zip(other.tasks, other.probabilities(point)[0], strict=True))
    for task in found:
        assert second[task] == pytest.approx(first[task], abs=1e-5)


def test_the_same_seed_gives_the_same_router_and_its_file_gives_it_back():
    one, two = (fit_router(prompts(), RouterConfig(), seed=4) for _ in range(2))
    back = Router.from_tensors(*one.to_tensors())
    points = np.random.default_rng(0).standard_normal((20, 3)) * 4
    for other in (two, back):
        assert other.decide(points) == one.decide(points)
    assert back.config == one.config
    with pytest.raises(InputError, match="not a router"):
        Router.from_tensors({}, {})


def test_a_router_without_a_task_never_names_it():
    router = fit_router(prompts(), RouterConfig()).without("code")
    assert router.tasks == ("math", "law")
    decisions = router.decide(np.concatenate(list(prompts(seed=2).values())))
    assert {decision.task for decision in decisions} <= {"math", "law"}
    assert all(len(decision.weights) == 2 for decision in decisions)


@pytest.mark.parametrize(
    ("p", "least", "weights"),
    [
        ((0.6, 0.37, 0.03), 0.05, (0.62, 0.38, 0.0)),
        ((1 / 3, 1 / 3, 1 / 3), 0.05, (0.34, 0.33, 0.33)),
        ((0.3, 0.3, 0.4), 0.5, (0.0, 0.0, 1.0)),
    ],
)
def test_small_shares_are_left_out_and_the_rest_sums_to_one(p, least, weights):
    assert tuple(blend(np.array(p), least)) == pytest.approx(weights)
    assert blend(np.array(p), least).sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["entropy", "max_prob"])
def test_uncertainty_runs_from_none_to_one(kind):
    assert uncertainty(np.array([1.0, 0, 0]), kind) == 0
    assert uncertainty(np.full(3, 1 / 3), kind) == pytest.approx(1)
    assert 0 < uncertainty(np.array([0.8, 0.1, 0.1]), kind) < 1


def test_a_feature_that_is_not_finite_is_answered_by_all_and_said(caplog):
    router = fit_router(prompts(), RouterConfig())
    (decision,) = router.decide(np.array([[np.nan, 0, 0]]))
    assert decision.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert "not finite" in caplog.text


def test_prompts_that_are_too_few_are_refused_or_warned_of(caplog):
    found = prompts()
    with pytest.raises(InputError, match="task `law` has no prompts; expected 8 or more"):
        fit_router({**found, "law": np.empty((0, 3))}, RouterConfig())
    with pytest.raises(InputError, match="at least 2 tasks, found 1"):
        fit_router({"law": found["law"]}, RouterConfig())
    fit_router({**found, "law": found["law"][:7]}, RouterConfig())
    assert "task `law` has 7 prompts" in caplog.text
    assert "over-confident" in caplog.text
    with pytest.raises(InputError, match="task `law` has a feature that is not finite"):
        fit_router({**found, "law": np.full((9, 3), np.inf)}, RouterConfig())
