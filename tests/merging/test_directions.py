"""NuSLERP, Multi-SLERP and the Karcher mean against steps on whole vectors, and where they are SLERP."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge, merge_state_dicts, merge_tensors

from .made import page, read


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = normal(0, 6, 50)
MODELS = [BASE + normal(seed, 6, 50) for seed in (1, 2, 3)]


def arc(t, x, y):
    """A blend along the arc between two vectors, in float64."""
    x, y = x.astype(float), y.astype(float)
    angle = np.arccos(x @ y / np.sqrt((x @ x) * (y @ y)))
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def karcher_by_steps(vectors, max_iter, tol):
    """The mean on the sphere, with whole vectors."""
    lengths = [np.linalg.norm(v) for v in vectors]
    units = [v.astype(float) / length for v, length in zip(vectors, lengths, strict=True)]
    mean = np.mean(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos(np.clip(mean @ unit, -1, 1))
            if angle >= tol:
                step += angle / np.sin(angle) * (unit - (mean @ unit) * mean) / len(units)
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean /= np.linalg.norm(mean)
    return np.mean(lengths) * mean


@pytest.mark.parametrize("base", [None, BASE])
@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.2, 0.6), (3.0, -1.0)])
def test_nuslerp_turns_the_whole_tensor(base, weight):
    origin = np.zeros_like(BASE) if base is None else base
    x, y = ((model - origin).reshape(-1) for model in MODELS[:2])
    wanted = origin + arc(weight[1] / sum(weight), x, y).reshape(BASE.shape)
    merged = merge_tensors(base, MODELS[:2], "nuslerp", weight=weight)
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(6, 50), (3, 4, 25)])
def test_nuslerp_turns_line_by_line(columns, shape):
    x, y = (model.reshape(shape) for model in MODELS[:2])
    merged = merge_tensors(
        None, [x, y], "nuslerp", weight=(1.0, 3.0), nuslerp_flatten=False, nuslerp_row_wise=columns
    )
    axis = -2 if columns else -1
    lines = [np.moveaxis(z, axis, -1).reshape(-1, shape[axis]) for z in (x, y, merged)]
    for first, second, found in zip(*lines, strict=True):
        np.testing.assert_allclose(found, arc(0.75, first, second), rtol=1e-4, atol=1e-5)


def test_nuslerp_by_lines_takes_a_vector_whole():
    x, y = (model[0] for model in MODELS[:2])
    for columns in (False, True):
        merged = merge_tensors(None, [x, y], "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=columns)
        np.testing.assert_allclose(merged, arc(0.5, x, y), rtol=1e-4, atol=1e-5)


def test_nuslerp_of_two_models_is_slerp():
    merged = merge_tensors(None, MODELS[:2], "nuslerp", weight=(0.7, 0.3))
    np.testing.assert_allclose(merged, merge_tensors(None, MODELS[:2], "slerp", t=0.3), rtol=1e-4, atol=1e-6)


def test_nuslerp_without_an_angle_is_the_straight_blend():
    for other in (3 * BASE, np.zeros_like(BASE)):
        merged = merge_tensors(None, [BASE, other], "nuslerp", weight=(3.0, 1.0))
        np.testing.assert_allclose(merged, 0.75 * BASE + 0.25 * other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_with_a_base_models_equal_to_it_give_it_bit_for_bit(method):
    np.testing.assert_array_equal(merge_tensors(BASE, [BASE.copy(), BASE.copy()], method), BASE)


@pytest.mark.parametrize("base", [None, BASE])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_the_mean_direction_at_the_mean_length(base, normalize):
    origin = np.zeros_like(BASE) if base is None else base
    weights = np.array([0.5, 0.2, 0.4])
    vectors = [(model - origin).reshape(-1).astype(float) for model in MODELS]
    shares = weights / weights.sum() if normalize else weights
    lengths = np.array([np.linalg.norm(vector) for vector in vectors])
    mean = sum(share * v / length for share, v, length in zip(shares, vectors, lengths, strict=True))
    wanted = origin + (shares @ lengths * mean / np.linalg.norm(mean)).reshape(BASE.shape)
    merged = merge_tensors(base, MODELS, "multislerp", weight=tuple(weights), normalize_weights=normalize)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def test_the_tangent_step_that_multislerp_leaves_out_moves_nothing():
    vectors = [normal(seed, 100).astype(float) for seed in range(3)]
    weights = np.array([0.5, 0.2, 0.3])
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean /= np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    np.testing.assert_allclose(tangent, 0, atol=1e-15)


def test_multislerp_of_equally_long_models_at_equal_weights_is_slerp():
    x, y = normal(1, 400), normal(2, 400)
    y *= np.linalg.norm(x) / np.linalg.norm(y)
    merged = merge_tensors(None, [x, y], "multislerp")
    np.testing.assert_allclose(merged, merge_tensors(None, [x, y], "slerp", t=0.5), rtol=1e-4, atol=1e-6)


def test_multislerp_of_directions_that_cancel_is_the_straight_blend():
    merged = merge_tensors(None, [BASE, -3 * BASE], "multislerp")
    np.testing.assert_allclose(merged, -BASE, rtol=1e-5)
    with pytest.raises(InputError, match="sum to 0; set `normalize_weights: false`"):
        merge_tensors(None, MODELS[:2], "multislerp", weight=(1.0, -1.0))


@pytest.mark.parametrize("max_iter", [0, 1, 3, 50])
def test_karcher_walks_as_whole_vectors_do(max_iter):
    vectors = [np.abs(normal(seed, 3)) * scale for seed, scale in ((1, 1), (2, 3), (5, 0.5))]
    wanted = karcher_by_steps(vectors, max_iter, 1e-9)
    merged = merge_tensors(None, vectors, "karcher", max_iter=max_iter, tol=1e-9)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def test_no_point_of_the_sphere_nearby_is_nearer_to_all():
    vectors = [v / np.linalg.norm(v) for v in (np.abs(normal(seed, 4)) for seed in (1, 2, 3))]
    mean = merge_tensors(None, vectors, "karcher", max_iter=100, tol=1e-8).astype(float)

    def distance(point):
        point = point / np.linalg.norm(point)
        return sum(np.arccos(np.clip(point @ v, -1, 1)) ** 2 for v in vectors)

    for seed in range(50):
        assert distance(mean) <= distance(mean + 1e-2 * normal(100 + seed, 4)) + 1e-9


def test_karcher_of_two_models_is_slerp_halfway_at_their_mean_length():
    x, y = normal(1, 400), 2 * normal(2, 400)
    merged = merge_tensors(None, [x, y], "karcher")
    units = [v / np.linalg.norm(v) for v in (x, y)]
    wanted = merge_tensors(None, units, "slerp", t=0.5)
    wanted *= (np.linalg.norm(x) + np.linalg.norm(y)) / 2
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-6)


def test_karcher_of_zeros_is_zeros_and_of_one_model_that_model():
    zeros = np.zeros(5, np.float32)
    np.testing.assert_array_equal(merge_tensors(None, [zeros, zeros], "karcher"), zeros)
    np.testing.assert_array_equal(merge_tensors(None, [BASE], "karcher"), BASE)
    with pytest.raises(InputError, match="max_iter: must be a whole number from 0 on, got -1"):
        merge_tensors(None, MODELS, "karcher", max_iter=-1)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_on_a_page_makes_it_a_blend_of_changes(method, exact_family, tmp_path):
    made = page(exact_family, method, models=("m1", "m2"))
    merge(made, tmp_path / "out")
    base, one, two = (read(exact_family / name) for name in ("base", "m1", "m2"))
    wanted, without = merge_state_dicts(base, [one, two], method), merge_state_dicts(None, [one, two], method)
    found = read(tmp_path / "out")
    assert any((wanted[name] != without[name]).any() for name in base)
    for name in base:
        np.testing.assert_array_equal(found[name], wanted[name])
