"""DELLA: a random mask whose probabilities follow the ranks of a row."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import memory, merge_tensors
from weightsmith.merging.dropout import keep_flags_each, keep_flags_ranked, keys
from weightsmith.merging.methods.della_linear import by_rank
from weightsmith.merging.parameter import Scratch


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = normal(0, 6, 50)
MODELS = [BASE + 0.1 * normal(seed, 6, 50) for seed in (1, 2, 3)]


def nine_digits(values):
    """Exponent and nine binary digits (the first is not stored) as integers that order magnitudes."""
    return np.abs(values).astype(np.float32).view(np.uint32) >> np.uint32(23 - 8)


def probabilities(values, density, epsilon):
    """By counting: how many entries of the row an entry outranks."""
    found = np.empty(values.shape)
    for r, row in enumerate(nine_digits(values)):
        for i, own in enumerate(row):
            rank = sum(other < own or (other == own and j < i) for j, other in enumerate(row))
            found[r, i] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return found


@pytest.mark.parametrize("row", [2, 3, 1024, 2816, 65_537])
@pytest.mark.parametrize("coarse", [False, True])
def test_entries_are_ranked_by_exponent_and_nine_binary_digits_then_by_place(row, coarse):
    values = np.random.default_rng(row).standard_normal((2, row)).astype(np.float32)
    values = np.round(values) if coarse else values
    places = by_rank(values.reshape(-1), row, Scratch()).reshape(2, row)
    for magnitudes, found, start in zip(nine_digits(values), places, (0, row), strict=True):
        np.testing.assert_array_equal(found, start + np.lexsort((np.arange(row), magnitudes)))


def test_in_a_row_of_one_entry_the_density_itself_holds():
    base, model = np.zeros((4000, 1), np.float32), np.full((4000, 1), 2, np.float32)
    for options in ({"epsilon": 0.2}, {"epsilon": 0.0}):
        merged = merge_tensors(base, [model], "della_linear", density=0.4, **options)
        np.testing.assert_allclose(np.unique(merged), [0, 5])
        assert (merged != 0).mean() == pytest.approx(0.4, abs=4 * (0.24 / 4000) ** 0.5)


def test_entries_are_kept_as_often_as_their_rank_says_and_divided_by_that():
    base, model = np.zeros((3, 16), np.float32), normal(1, 3, 16)
    wanted = probabilities(model, 0.5, 0.3)
    runs = np.stack(
        [merge_tensors(base, [model], "della_linear", epsilon=0.3, seed=seed) for seed in range(600)]
    )
    kept = runs != 0
    error = np.sqrt(wanted * (1 - wanted) / len(runs))
    assert (np.abs(kept.mean(axis=0) - wanted) < 5 * error).all()
    np.testing.assert_allclose(runs, kept * model / wanted, rtol=1e-5)


def test_without_epsilon_it_is_dare_bit_for_bit():
    for mine, other in (("della_linear", "dare_linear"), ("della", "dare_ties")):
        options = {"density": 0.5, "seed": 3, "weight": (0.2, 1.0, 0.7)}
        found = merge_tensors(BASE, MODELS, mine, epsilon=0.0, **options)
        np.testing.assert_array_equal(found, merge_tensors(BASE, MODELS, other, **options))


def test_without_drops_it_is_task_arithmetic():
    merged = merge_tensors(BASE, MODELS, "della_linear", density=1.0, weight=(0.2, 0.5, 0.3), lambda_=0.5)
    wanted = merge_tensors(BASE, MODELS, "task_arithmetic", weight=(0.2, 0.5, 0.3), lambda_=0.5)
    np.testing.assert_allclose(merged, wanted, atol=1e-6)


@pytest.mark.parametrize("zero_sign", ["majority", "positive"])
def test_della_is_the_election_of_what_della_linear_keeps(zero_sign):
    options = {"density": 0.6, "epsilon": 0.2, "seed": 3}
    base = np.zeros((6, 50), np.float32)
    models = [normal(seed, 6, 50) for seed in (1, 2, 3)]
    kept = [
        merge_tensors(base, [base] * place + [model], "della_linear", **options)
        for place, model in enumerate(models)
    ]
    sign = np.where(sum(kept) < 0, -1, 1)
    agreeing = [np.where(change * sign > 0, change, 0) for change in kept]
    count = np.maximum(sum(change != 0 for change in agreeing), 1)
    merged = merge_tensors(base, models, "della", zero_sign=zero_sign, **options)
    np.testing.assert_allclose(merged, sum(agreeing) / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["della_linear", "della"])
@pytest.mark.parametrize("shape", [(6, 50), (300,)])
def test_the_l1_norm_of_a_change_can_be_restored(method, shape):
    base, model = BASE.reshape(shape), MODELS[0].reshape(shape)
    merged = merge_tensors(base, [model], method, density=0.4, rescale="l1")
    np.testing.assert_allclose(np.abs(merged - base).sum(), np.abs(model - base).sum(), rtol=1e-3)
    factors = ((merged - base) / (model - base))[np.abs(merged - base) > 1e-3]
    assert factors.min() > 0.99 * factors.max()


def test_a_vector_is_one_row_however_it_is_cut(monkeypatch):
    base, model = np.zeros(20_000, np.float32), normal(1, 20_000)
    merged = merge_tensors(base, [model], "della_linear", rescale="none")
    as_row = merge_tensors(base[None], [model[None]], "della_linear", rescale="none")
    np.testing.assert_array_equal(merged, as_row[0])
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 4096)
    np.testing.assert_array_equal(merged, merge_tensors(base, [model], "della_linear", rescale="none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, r"epsilon: must be in \[0, 0.1\) at density 0.1, got 0.15"),
        ({"density": 0.9}, r"epsilon: must be in \[0, 0.1\) at density 0.9, got 0.15"),
        ({"density": (0.5, 0.5, 0.2), "epsilon": 0.3}, r"\[0, 0.2\) at density 0.2, got 0.3"),
        ({"epsilon": -0.1}, r"epsilon: must be in \[0, inf\), got -0.1"),
    ],
)
def test_probabilities_outside_0_and_1_are_refused_with_what_is_legal(options, message):
    with pytest.raises(InputError, match=message):
        merge_tensors(BASE, MODELS, "della", **options)


def test_places_of_a_row_are_kept_as_often_as_their_probabilities_say_wherever_rows_are_cut():
    key = keys(1, "w", 1)[0]
    chances = np.float64([0.5, 0.3, 2**-10, 1 - 2**-10, 0.8])
    whole = keep_flags_each(key, 0, chances, np.empty((40_000, 5), np.bool_))
    error = np.sqrt(chances * (1 - chances) / len(whole))
    assert (np.abs(whole.mean(axis=0) - chances) < 4.5 * error + 2**-17).all()
    assert abs(np.corrcoef(whole[:, 0], whole[:, 1])[0, 1]) < 4.5 / len(whole) ** 0.5
    cuts = [keep_flags_each(key, 5 * at, chances, np.empty((20_000, 5), np.bool_)) for at in (0, 20_000)]
    np.testing.assert_array_equal(np.concatenate(cuts), whole)


@pytest.mark.parametrize("row", [2, 7, 64])
@pytest.mark.parametrize("coarse", [False, True])
def test_larger_entries_of_a_row_are_kept_as_their_ranks_say_without_ranking(row, coarse):
    values = 3 * normal(row, row)
    values = np.round(values) if coarse else values
    sizes = np.abs(values)
    # Mean ranks, of equals too.
    ranks = (sizes < sizes[:, None]).sum(axis=1) + ((sizes == sizes[:, None]).sum(axis=1) - 1) / 2
    wanted = 0.4 - 0.25 + 0.5 * ranks / (row - 1)
    rows, key = 60_000, keys(1, "w", 1)[0]
    kept = keep_flags_ranked(key, 0, np.tile(values, rows), row, 0.4, 0.25, np.empty(rows * row, np.bool_))
    kept = kept.reshape(rows, row)
    error = np.sqrt(wanted * (1 - wanted) / rows)
    assert (np.abs(kept.mean(axis=0) - wanted) < 4.5 * error).all()
    assert abs(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1]) < 4.5 / rows**0.5


@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 1e-12), (0.5, 0.5 - 1e-12), (1e-11, 5e-12)])
def test_ranked_draws_take_every_range_of_probabilities_there_is(density, epsilon):
    values, key = normal(9, 500, 40), keys(1, "w", 1)[0]
    out = np.empty(values.size, np.bool_)
    kept = keep_flags_ranked(key, 0, values.reshape(-1), 40, density, epsilon, out)
    assert kept.mean() == pytest.approx(density, abs=4 * (density / values.size) ** 0.5)


def test_ranked_draws_do_not_depend_on_how_rows_are_cut():
    values, key = normal(9, 40, 31), keys(1, "w", 1)[0]
    whole = keep_flags_ranked(key, 0, values.reshape(-1), 31, 0.5, 0.2, np.empty(values.size, np.bool_))
    for at in (1, 17):
        cuts = [
            keep_flags_ranked(key, 31 * start, part.reshape(-1), 31, 0.5, 0.2, np.empty(part.size, np.bool_))
            for start, part in ((0, values[:at]), (at, values[at:]))
        ]
        np.testing.assert_array_equal(np.concatenate(cuts), whole)
