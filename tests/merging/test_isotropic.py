"""Iso-C and Iso-CTS against SVDs in float64."""

import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts
from weightsmith.merging.methods.iso_cts import shares

NAME = "model.layers.0.mlp.weight"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def merged(deltas, method, **options):
    """The merged change, in fp32 as a merge has it."""
    base = np.zeros(deltas.shape[1:], np.float32)
    models = [{NAME: delta.astype(np.float32)} for delta in deltas]
    return merge_state_dicts({NAME: base}, models, method, **options)[NAME]


def polar(columns):
    u, _, vh = np.linalg.svd(columns, full_matrices=False)
    return u @ vh


def iso_cts_reference(deltas, common):
    """Step by step, as the public code goes."""
    tasks, q = len(deltas), min(deltas.shape[1:])
    own = round((q - int(q * common)) / tasks)
    kept = q - tasks * own
    u, s, vh = (part for part in np.linalg.svd(deltas.sum(axis=0), full_matrices=False))
    lefts, values, rights = [u[:, :kept]], [s[:kept]], [vh[:kept].T]
    for delta in deltas:
        rest = delta - u[:, :kept] @ u[:, :kept].T @ delta
        a, b, ch = np.linalg.svd(rest, full_matrices=False)
        lefts.append(a[:, :own])
        values.append(b[:own])
        rights.append(ch[:own].T)
    mean = np.concatenate(values).mean()
    return mean * polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (3, 16, 16), (4, 7, 30)])
def test_iso_c_is_the_sum_with_equal_singular_values(shape):
    deltas = random(*shape)
    u, s, vh = np.linalg.svd(deltas.sum(axis=0), full_matrices=False)
    found = merged(deltas, "iso_c")
    np.testing.assert_allclose(found, s.mean() * u @ vh, atol=2e-4 * s.mean())
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), s.mean(), rtol=1e-4)


def test_iso_c_leaves_directions_that_nobody_changed_alone():
    u, v = np.linalg.qr(random(9, 9))[0], np.linalg.qr(random(14, 9, seed=1))[0]
    deltas = np.stack([(u[:, :2] * [3.0, 1.0]) @ v[:, :2].T, (u[:, 1:3] * [1.0, 4.0]) @ v[:, 1:3].T])
    found = merged(deltas, "iso_c")
    wanted = (3.0 + 2.0 + 4.0) / 9 * u[:, :3] @ v[:, :3].T
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_order_scale_and_strength_pass_through(method):
    deltas = random(3, 14, 20)
    found = merged(deltas, method)
    np.testing.assert_allclose(merged(deltas[[2, 0, 1]], method), found, atol=1e-4)
    np.testing.assert_allclose(merged(-1e-3 * deltas, method), -1e-3 * found, atol=1e-7)
    np.testing.assert_allclose(merged(deltas, method, alpha=0.3), 0.3 * found, atol=1e-4)
    alpha = (0.5, -1.0, 2.0)
    scaled = merged(deltas * np.array(alpha)[:, None, None], method)
    np.testing.assert_allclose(merged(deltas, method, alpha=alpha), scaled, atol=1e-4)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_what_no_task_changed_is_the_base_bit_for_bit(method):
    base = {NAME: random(6, 8).astype(np.float32)}
    found = merge_state_dicts(base, [base, base], method)
    np.testing.assert_array_equal(found[NAME], base[NAME])


@pytest.mark.parametrize("shape", [(2, 12, 20), (3, 20, 15), (4, 16, 16)])
@pytest.mark.parametrize("common", [0.8, 0.5, 0.0])
def test_iso_cts_follows_its_steps(shape, common):
    deltas = random(*shape)
    if common == 0.0 and shape[1] % shape[0]:
        pytest.skip("the public code takes more directions than there are")
    wanted = iso_cts_reference(deltas, common)
    found = merged(deltas, "iso_cts", common=common)
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_iso_cts_with_common_directions_only_or_of_one_task_is_iso_c():
    deltas = random(3, 12, 20)
    wanted = merged(deltas, "iso_c")
    np.testing.assert_allclose(merged(deltas, "iso_cts", common=1.0), wanted, atol=1e-4)
    alone = merged(deltas[:1], "iso_cts", common=0.5)
    np.testing.assert_allclose(alone, merged(deltas[:1], "iso_c"), atol=1e-3)


@pytest.mark.parametrize("q", range(1, 12))
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("common", [0.0, 0.3, 0.8, 1.0])
def test_directions_are_shared_out_to_the_last_one(q, tasks, common):
    shared, own = shares(q, tasks, common)
    assert shared + tasks * own == q
    assert shared >= 0 <= own


def test_a_task_whose_change_lies_in_the_common_directions_adds_no_rounding():
    one = random(12, 3) @ random(3, 20, seed=1)
    found = merged(np.stack([one, one]), "iso_cts", common=0.5)
    u, s, vh = np.linalg.svd(2 * one, full_matrices=False)
    np.testing.assert_allclose(found, s[:3].sum() / 12 * u[:, :3] @ vh[:3], atol=1e-4)


def test_a_share_of_common_directions_outside_0_and_1_is_named():
    with pytest.raises(InputError, match=r"common: must be in \[0, 1\], got 1.5"):
        merged(random(2, 3, 4), "iso_cts", common=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_a_gpu_gives_the_same_merge(method):
    deltas = random(3, 96, 128)
    assert torch.cuda.is_available()
    found = merged(deltas, method, device="cuda")
    wanted = merged(deltas, method)
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
