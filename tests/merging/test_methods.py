"""Each method against its equations: slow references, brute force and the limits where it is another one."""

import math

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts, merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = normal(0, 6, 50)
MODELS = [BASE + 0.1 * normal(seed, 6, 50) for seed in (1, 2, 3)]


def task_sum(weights, models=MODELS):
    return BASE + sum(weight * (model - BASE) for weight, model in zip(weights, models, strict=True))


def ties_entry(changes, weights, zero_sign, normalize):
    """TIES's election for one entry, in plain Python."""
    total = sum(weight * change for weight, change in zip(weights, changes, strict=True))
    sign = math.copysign(1, total) if total else zero_sign
    agreeing = [
        (weight, weight * change)
        for weight, change in zip(weights, changes, strict=True)
        if weight * change * sign > 0
    ]
    divisor = sum(weight for weight, _ in agreeing) if normalize else 1.0
    return sum(value for _, value in agreeing) / divisor if agreeing else 0.0


def ties_reference(base, models, weights, density, *, majority, normalize=True):
    """TIES on one flat vector, entry by entry."""
    count = int(density * base.size)
    trimmed = []
    for model in models:
        change = (model - base).astype(float)
        order = sorted(range(base.size), key=lambda i: (-abs(change[i]), i))
        kept = set(order[:count])
        trimmed.append([change[i] if i in kept else 0.0 for i in range(base.size)])
    sums = [sum(w * t[i] for w, t in zip(weights, trimmed, strict=True)) for i in range(base.size)]
    balance = sum(int(s > 0) - int(s < 0) for s in sums)
    zero_sign = -1 if majority and balance < 0 else 1
    merged = [ties_entry([t[i] for t in trimmed], weights, zero_sign, normalize) for i in range(base.size)]
    return base + np.array(merged)


def test_linear_is_the_weighted_mean():
    merged = merge_tensors(None, MODELS, "linear", weight=(1.0, 2.0, 5.0))
    np.testing.assert_allclose(merged, (MODELS[0] + 2 * MODELS[1] + 5 * MODELS[2]) / 8, rtol=1e-6)


def test_linear_without_normalising_is_the_weighted_sum():
    merged = merge_tensors(None, MODELS, "linear", weight=(1.0, -2.0, 0.5), normalize=False)
    np.testing.assert_allclose(merged, MODELS[0] - 2 * MODELS[1] + 0.5 * MODELS[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_mean_of_one_model_repeated_is_that_model_bit_for_bit(count):
    coarse = (MODELS[0].view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(merge_tensors(None, [coarse] * count, "linear"), coarse)


def test_weights_that_cancel_are_refused_for_a_mean():
    with pytest.raises(InputError, match="sum to 0; set `normalize: false`"):
        merge_tensors(None, MODELS, "linear", weight=(1.0, 1.0, -2.0))


def test_task_arithmetic_adds_scaled_changes():
    merged = merge_tensors(BASE, MODELS, "task_arithmetic", weight=(0.5, 1.0, -1.0), lambda_=0.7)
    np.testing.assert_allclose(merged, task_sum((0.35, 0.7, -0.7)), rtol=1e-5, atol=1e-6)


def test_task_arithmetic_with_a_share_each_is_the_mean():
    mean = merge_tensors(None, MODELS, "linear")
    np.testing.assert_allclose(merge_tensors(BASE, MODELS, "task_arithmetic", lambda_=1 / 3), mean, atol=1e-6)
    np.testing.assert_allclose(
        merge_tensors(BASE, MODELS, "task_arithmetic", normalize=True), mean, atol=1e-6
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock"])
def test_models_equal_to_the_base_give_the_base_bit_for_bit(method):
    merged = merge_tensors(BASE, [BASE.copy(), BASE.copy()], method)
    np.testing.assert_array_equal(merged, BASE)


@pytest.mark.parametrize("zero_sign", ["majority", "positive"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.4, 0.4, 0.4), (0.2, 1.0, 0.7), (1.0, -0.5, 2.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_the_reference_entry_by_entry(zero_sign, weights, normalize):
    # Few distinct values: ties in magnitude, exact zeros and votes that cancel are all there.
    rng = np.random.default_rng(5)
    base = rng.integers(-3, 4, 200).astype(np.float32)
    models = [base + rng.integers(-2, 3, 200).astype(np.float32) for _ in range(3)]
    merged = merge_tensors(
        base, models, "ties", weight=weights, density=0.35, zero_sign=zero_sign, normalize=normalize
    )
    wanted = ties_reference(
        base, models, weights, 0.35, majority=zero_sign == "majority", normalize=normalize
    )
    np.testing.assert_allclose(merged, wanted, rtol=1e-6, atol=1e-6)


def test_votes_that_cancel_take_the_sign_of_the_majority():
    base = np.zeros(5, np.float32)
    one = np.float32([1, -1, -1, -1, 0])
    two = np.float32([-1, -1, -1, 0, 0])
    common = {"density": 1.0, "trim_scope": "tensor"}
    assert merge_tensors(base, [one, two], "ties", **common)[0] == -1
    assert merge_tensors(base, [one, two], "ties", zero_sign="positive", **common)[0] == 1


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
def test_ties_keeps_exactly_the_promised_number_of_entries(density):
    base = np.zeros(1000, np.float32)
    model = np.where(np.arange(1000) % 3, 0.5, -0.5).astype(np.float32)  # all magnitudes are equal
    merged = merge_tensors(base, [model], "ties", density=density)
    kept = np.flatnonzero(merged)
    np.testing.assert_array_equal(kept, np.arange(int(density * 1000)))


def test_the_scope_of_the_trim_is_the_tensor_or_the_model():
    base = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    model = {"a": np.float32([9, 8, 7, 6]), "b": np.float32([1, 2, 3, 4])}
    whole = merge_state_dicts(base, [model], "ties", density=0.5)
    each = merge_state_dicts(base, [model], "ties", density=0.5, trim_scope="tensor")
    np.testing.assert_array_equal(whole["a"], [9, 8, 7, 6])
    np.testing.assert_array_equal(whole["b"], 0)
    np.testing.assert_array_equal(each["a"], [9, 8, 0, 0])
    np.testing.assert_array_equal(each["b"], [0, 0, 3, 4])


def test_ties_without_trim_where_all_signs_agree_is_the_mean_of_changes():
    models = [BASE + np.abs(model - BASE) for model in MODELS]
    merged = merge_tensors(BASE, models, "ties", density=1.0)
    np.testing.assert_allclose(merged, task_sum([1 / 3] * 3, models), rtol=1e-5, atol=1e-6)


def test_a_rescaled_trim_keeps_the_l1_norm_of_the_change():
    merged = merge_tensors(BASE, MODELS[:1], "ties", density=0.2, rescale="l1")
    np.testing.assert_allclose(np.abs(merged - BASE).sum(), np.abs(MODELS[0] - BASE).sum(), rtol=1e-3)


def test_dare_without_drops_is_task_arithmetic():
    merged = merge_tensors(BASE, MODELS, "dare_linear", density=1.0, weight=(0.2, 0.5, 0.3), lambda_=0.5)
    wanted = merge_tensors(BASE, MODELS, "task_arithmetic", weight=(0.2, 0.5, 0.3), lambda_=0.5)
    np.testing.assert_allclose(merged, wanted, atol=1e-6)


def test_dare_is_task_arithmetic_on_average():
    base, model = np.zeros(64, np.float32), np.ones(64, np.float32)
    runs = np.stack(
        [merge_tensors(base, [model], "dare_linear", density=0.3, seed=seed) for seed in range(400)]
    )
    # Each entry is 1/0.3 with probability 0.3: variance 0.7/0.3 a draw.
    error = np.sqrt(0.7 / 0.3 / runs.size)
    assert abs(runs.mean() - 1.0) < 4 * error
    assert np.abs(runs.mean(axis=0) - 1.0).max() < 5 * np.sqrt(0.7 / 0.3 / 400)
    assert set(np.unique(runs)) == {np.float32(0), np.float32(1 / 0.3)}


@pytest.mark.parametrize(("rescale", "factor"), [("paper", 4.0), ("none", 1.0)])
def test_dare_multiplies_what_it_keeps(rescale, factor):
    change = merge_tensors(BASE, MODELS[:1], "dare_linear", density=0.25, rescale=rescale) - BASE
    kept = np.abs(change) > 1e-7
    np.testing.assert_allclose(change[kept], factor * (MODELS[0] - BASE)[kept], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_can_restore_the_l1_norm(method):
    merged = merge_tensors(BASE, MODELS[:1], method, density=0.4, rescale="l1")
    np.testing.assert_allclose(np.abs(merged - BASE).sum(), np.abs(MODELS[0] - BASE).sum(), rtol=1e-3)


def test_dare_ties_is_the_election_of_what_dare_keeps():
    base, models = BASE[0], [model[0] for model in MODELS]
    dropped = [
        merge_tensors(base, [base] * index + [model], "dare_linear", density=0.5, seed=3) - base
        for index, model in enumerate(models)
    ]
    merged = merge_tensors(base, models, "dare_ties", density=0.5, seed=3, zero_sign="positive")
    wanted = [
        ties_entry([float(d[i]) if abs(d[i]) > 1e-6 else 0.0 for d in dropped], (1.0,) * 3, 1, True)
        for i in range(base.size)
    ]
    np.testing.assert_allclose(merged - base, wanted, atol=1e-5)


def test_slerp_keeps_the_norm_between_equally_long_ends():
    a, b = normal(1, 400), normal(2, 400)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    for t in (0.0, 0.25, 0.5, 1.0):
        merged = merge_tensors(None, [a, b], "slerp", t=t)
        np.testing.assert_allclose(np.linalg.norm(merged), 1.0, rtol=1e-5)
        angle = np.arccos(np.clip(a @ b, -1, 1))
        np.testing.assert_allclose(np.arccos(np.clip(merged @ a, -1, 1)), t * angle, atol=1e-3)


def test_slerp_of_nearly_parallel_tensors_is_the_straight_blend():
    merged = merge_tensors(None, [BASE, 3 * BASE], "slerp", t=0.25)
    np.testing.assert_allclose(merged, 1.5 * BASE, rtol=1e-6)


def test_slerp_counts_a_base_as_its_first_end():
    np.testing.assert_array_equal(merge_tensors(BASE, MODELS[:1], "slerp", t=0.0), BASE)
    with pytest.raises(InputError, match="merges 2 models, got 3"):
        merge_tensors(BASE, MODELS[:2], "slerp")


def test_model_stock_of_identical_models_is_that_model():
    np.testing.assert_allclose(
        merge_tensors(BASE, [MODELS[0]] * 3, "model_stock"), MODELS[0], rtol=1e-5, atol=1e-6
    )


def test_model_stock_of_orthogonal_changes_is_the_base():
    one, two = np.float32([1, 0, 0, 2]), np.float32([0, 3, 1, 0])
    np.testing.assert_array_equal(merge_tensors(np.zeros(4, np.float32), [one, two], "model_stock"), 0)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_is_its_formula(filter_wise):
    models = [model + 0.2 for model in MODELS]  # a common part, so that the cosines are well above 0
    changes = [model.astype(float) - BASE for model in models]
    rows = np.ones((6, 1)) if not filter_wise else None

    def cosine(x, y):
        axis = -1 if filter_wise else None
        norm = np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))
        return (x * y).sum(axis=axis) / norm

    c = (cosine(changes[0], changes[1]) + cosine(changes[0], changes[2]) + cosine(changes[1], changes[2])) / 3
    share = 3 * c / (1 + 2 * c)
    share = share[:, None] if filter_wise else share * rows
    merged = merge_tensors(BASE, models, "model_stock", filter_wise=filter_wise)
    np.testing.assert_allclose(merged, BASE + share * np.mean(changes, axis=0), rtol=1e-4, atol=1e-5)


def test_model_stock_of_opposed_changes_stays_with_the_base_unless_told_otherwise():
    one, two = BASE + 1, BASE - 0.5 + 0.1 * normal(9, 6, 50)
    np.testing.assert_allclose(merge_tensors(BASE, [one, two], "model_stock"), BASE, atol=1e-6)
    assert np.abs(merge_tensors(BASE, [one, two], "model_stock", clamp=False) - BASE).max() > 0.1


def test_passthrough_copies_and_scales():
    np.testing.assert_array_equal(merge_tensors(None, [BASE], "passthrough"), BASE)
    np.testing.assert_array_equal(merge_tensors(None, [BASE], "passthrough", scale=2.0), 2 * BASE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density: must be in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density: must be in \(0, 1\], got 1.5"),
        ({"density": (0.5, 0.5)}, "density: has 2 values for 3 models"),
        ({"weight": float("nan")}, "weight: must be a finite number"),
        ({"weight": "much"}, "weight: must be a number or one for each model, got 'much'"),
        ({"trim_scope": "layer"}, "trim_scope: must be one of global, tensor, got 'layer'"),
        ({"normalize": 1}, "normalize: must be true or false, got 1"),
        ({"densty": 0.2}, "densty: no such option; did you mean `density`?"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_legal(options, message):
    with pytest.raises(InputError, match=message):
        merge_tensors(BASE, MODELS, "ties", **options)


def test_a_method_that_changes_a_base_needs_one():
    with pytest.raises(InputError, match="`ties` changes a base"):
        merge_tensors(None, MODELS, "ties")


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match=r"input 1: tensor is \[5, 50\], the first has \[6, 50\]"):
        merge_tensors(None, [BASE, BASE[:5]], "linear")


def test_tensors_of_torch_come_back_as_tensors_of_their_dtype():
    torch = pytest.importorskip("torch")
    models = [torch.tensor(model, dtype=torch.bfloat16) for model in MODELS]
    merged = merge_tensors(None, models, "linear")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, torch.stack([m.float() for m in models]).mean(0).bfloat16())


def test_integer_entries_are_copied_and_must_agree():
    base = {"w": BASE, "steps": np.array([3, 4])}
    merged = merge_state_dicts(base, [base | {"w": MODELS[0]}], "task_arithmetic")
    np.testing.assert_array_equal(merged["steps"], [3, 4])
    with pytest.raises(InputError, match="steps holds integers that differ"):
        merge_state_dicts(base, [base | {"steps": np.array([3, 5])}], "task_arithmetic")
