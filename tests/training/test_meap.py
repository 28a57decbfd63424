"""Which tokens MEAP masks: exact counts, uniform places, the same bits everywhere, no global generator."""

import math
import random

import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training import MEAPOptions, meap_mask_inputs
from weightsmith.training.meap import masking, selection

MASK = 999


def ids(rows, length, seed=0):
    return torch.randint(0, 900, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(allowed, ratio, seed, per_row=True):
    """The masked places, from the definition: Python's whole numbers, a plain sort."""

    def splitmix(x):
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden, places = 0x9E3779B97F4A7C15, set()
    for row, line in enumerate(allowed.tolist()):
        start = splitmix(seed + golden * (row + 1 if per_row else 1))
        keys = {place: splitmix(start + golden * place) for place, may in enumerate(line) if may}
        # The sign bit is the highest: keys from 2^63 on are the negative ones.
        order = sorted(keys, key=lambda place: (keys[place] + 2**63) % 2**64)
        count = max(1, math.floor(ratio * len(order) + 1e-9)) if order and ratio else 0
        places |= {(row, place) for place in order[:count]}
    return places


def chosen(allowed, ratio, seed, **options):
    return masking.filled(torch.zeros_like(allowed), masking.choose(allowed, ratio, seed, **options), True)


def on_torch(allowed, ratio, seed, per_row=True):
    """The path that a GPU and a compiled graph take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return masking.choose(allowed, ratio, seed, per_row=per_row)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.15, 0.5, 0.97])
@pytest.mark.parametrize("per_row", [True, False])
def test_both_paths_choose_what_the_definition_says(ratio, per_row):
    noise = torch.Generator().manual_seed(3)
    for length, share in ((7, 1.0), (64, 0.6), (3000, 1.0), (3000, 0.7)):
        allowed = torch.rand(3, length, generator=noise) < share
        allowed[1] &= torch.arange(length) < 2  # a row with next to nothing
        for seed in (0, -5, 2**63 - 1):
            wanted = reference(allowed, ratio, seed, per_row)
            for mask in (
                chosen(allowed, ratio, seed, per_row=per_row),
                on_torch(allowed, ratio, seed, per_row),
                on_torch(allowed, ratio, torch.tensor(seed), per_row),
            ):
                assert {tuple(place) for place in mask.nonzero().tolist()} == wanted


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.15, 0.5])
def test_counts_are_exact_and_the_last_token_that_a_row_has_stays(ratio):
    text = ids(6, 40)
    attention = torch.ones_like(text)
    attention[1, 30:], attention[2, :25], attention[3], attention[4, 1:] = 0, 0, 0, 0
    masked, where = meap_mask_inputs(text, MASK, ratio, attention_mask=attention, seed=1, return_mask=True)
    for row, eligible in enumerate((39, 29, 14, 0, 0, 39)):
        wanted = max(1, math.floor(ratio * eligible + 1e-9)) if eligible else 0
        assert where[row].sum() == wanted
    assert not where[(attention == 0)].any()
    assert not where[0, 39]
    assert not where[1, 29]
    assert not where[2, 39]
    assert torch.equal(masked, torch.where(where, MASK, text))


def test_nothing_and_everything_are_possible():
    text = ids(2, 9)
    assert torch.equal(meap_mask_inputs(text, MASK, 0.0, seed=0), text)
    everything = meap_mask_inputs(text, MASK, 1.0, seed=0)
    assert (everything[:, :-1] == MASK).all()
    assert torch.equal(everything[:, -1], text[:, -1])
    assert (meap_mask_inputs(text, MASK, 1.0, exclude_last=False, seed=0) == MASK).all()


def test_a_product_that_falls_short_by_rounding_still_counts():
    assert math.floor(0.29 * 100) == 28
    for count in range(1, 400):
        for percent in range(1, 100):
            assert masking.masked_count(count, percent / 100) == max(1, count * percent // 100)
    counts = np.arange(400)
    for ratio in (0.001, 0.1, 0.29, 0.5, 0.97):
        wanted = [masking.masked_count(count, ratio) for count in counts.tolist()]
        assert selection.masked_counts(counts, ratio).tolist() == wanted


def test_places_are_uniform_and_pairs_independent():
    length, rows = 20, 8000
    where = meap_mask_inputs(
        torch.zeros(rows, length, dtype=torch.long), MASK, 0.25, exclude_last=False, seed=11, return_mask=True
    )[1].double()
    expected = rows * 0.25
    # Exactly K of n: the statistic over n places has n - 1 degrees of freedom after this scaling.
    chi2 = float(((where.sum(0) - expected) ** 2).sum() / (expected * 0.75)) * (length - 1) / length
    assert 6 < chi2 < 39  # 99.8 % of a chi-squared with 19 degrees of freedom
    pairs = where.T @ where / rows
    wanted = 0.25 * (5 - 1) / (length - 1)
    off = pairs[~torch.eye(length, dtype=torch.bool)]
    assert (off - wanted).abs().max() < 5 * math.sqrt(wanted * (1 - wanted) / rows)


def test_each_token_by_itself_comes_out_at_the_ratio():
    where = meap_mask_inputs(ids(40, 1000), MASK, 0.15, exact_count=False, seed=2, return_mask=True)[1]
    counts = where.sum(1).double()
    assert counts.std() > 5
    assert abs(where[:, :-1].double().mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 40000)


def test_rows_and_seeds_differ_and_one_seed_is_one_mask():
    def where(seed, **options):
        return meap_mask_inputs(ids(4, 60), MASK, 0.3, seed=seed, return_mask=True, **options)[1]

    assert torch.equal(where(5), where(5))
    assert not torch.equal(where(5), where(6))
    assert len({tuple(row.tolist()) for row in where(5)}) == 4
    assert len({tuple(row.tolist()) for row in where(5, per_row=False)}) == 1


def test_no_global_generator_is_touched():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    meap_mask_inputs(ids(4, 60), MASK, seed=0)
    meap_mask_inputs(ids(4, 60), MASK, generator=torch.Generator().manual_seed(0))
    on_torch(torch.ones(2, 5, dtype=torch.bool), 0.5, 0)
    masking.authors_places(3, 20, 0.15)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_generator_gives_another_mask_each_time_and_the_same_again():
    def twice():
        generator = torch.Generator().manual_seed(4)
        return [meap_mask_inputs(ids(2, 50), MASK, generator=generator) for _ in range(2)]

    first, second = twice()
    assert not torch.equal(first, second)
    assert torch.equal(first, twice()[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtype_stays_and_nothing_is_written_in_place(dtype):
    text = ids(3, 30).to(dtype)
    before = text.clone()
    assert meap_mask_inputs(text, MASK, seed=0).dtype == dtype
    assert torch.equal(text, before)


def test_rows_of_no_tokens_stay():
    nothing = torch.empty(2, 0, dtype=torch.long)
    assert meap_mask_inputs(nothing, MASK, attention_mask=nothing, seed=0).shape == (2, 0)


@pytest.mark.parametrize(
    ("mask", "message"), [(300, "300 doesn't fit input_ids of torch.uint8"), (-1, "at least 0")]
)
def test_a_mask_that_ids_cant_hold_is_named(mask, message):
    with pytest.raises(InputError, match=message):
        meap_mask_inputs(ids(2, 8).to(torch.uint8), mask, seed=0)


def test_a_share_can_be_a_number_of_numpy():
    text = ids(2, 30)
    assert torch.equal(
        meap_mask_inputs(text, MASK, np.float32(0.25), seed=0), meap_mask_inputs(text, MASK, 0.25, seed=0)
    )


def test_a_compiled_mask_is_the_same_and_compiles_once_for_all_seeds():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(meap_mask_inputs, backend=backend, fullgraph=True)
    text = ids(2, 32)
    for seed in range(3):
        assert torch.equal(
            compiled(text, MASK, seed=torch.tensor(seed)), meap_mask_inputs(text, MASK, seed=seed)
        )
    assert len(graphs) == 1


def test_the_authors_places_are_those_of_their_generator():
    for step in (0, 1, 50, 51, 200):
        wanted = random.Random(50 + step % 51).sample(range(127), 19)
        assert masking.authors_places(step, 128, 0.15) == wanted
    assert masking.authors_places(0, 128, 0.15) == masking.authors_places(51, 128, 0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 15}, "mask_ratio must be in 0..1, got 15; 15 percent are 0.15"),
        ({"mask_ratio": -0.1}, "mask_ratio must be in 0..1, got -0.1"),
        ({"mask_ratio": math.nan}, "mask_ratio must be in 0..1, got nan"),
        ({"input_ids": torch.zeros(3, 4)}, "expected integers of shape (rows, tokens), got float32"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "got int64 of shape (4,)"),
        ({"eligible": torch.ones(2, 3)}, "eligible: expected the shape (3, 4) of input_ids, got (2, 3)"),
        ({"attention_mask": torch.ones(3, 1, 4, 4)}, "attention_mask: expected the shape (3, 4)"),
        ({"seed": None}, "needs either `seed` or `generator`"),
        ({"generator": torch.Generator()}, "needs either `seed` or `generator`"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"input_ids": torch.zeros(3, 4, dtype=torch.long), "mask_token_id": MASK, "seed": 0}
    with pytest.raises(InputError) as caught:
        meap_mask_inputs(**{**good, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "sftt"}, "mode must be one of pretrain, sft, got 'sftt'; did you mean `sft`?"),
        ({"mask_ratio": 10}, "10 percent are 0.1"),
        ({"mask_rate": 0.1}, "no option `mask_rate`; did you mean `mask_ratio`?"),
        ({"layout": "concat"}, "layout is about answers: it needs mode `sft`"),
        ({"mode": "sft", "seed_cycle": 51}, "seed_cycle is about whole rows"),
        ({"mode": "sft", "per_row": False}, "per_row is about whole rows: it needs mode `pretrain`"),
        ({"mode": "sft", "exclude_last": False}, "exclude_last is about whole rows"),
        ({"seed_cycle": 0}, "seed_cycle must be a whole number of at least 1, got 0"),
        ({"mode": "sft", "min_answer_tokens": 2.5}, "min_answer_tokens must be a whole number"),
        ({"mode": "sft", "copy_loss_weight": -1.0}, "copy_loss_weight must be at least 0"),
        ({"mask_token": "<m>", "add_mask_token": True}, "names a token that is there"),
    ],
)
def test_a_wrong_option_is_named(fields, message):
    with pytest.raises(InputError) as caught:
        MEAPOptions.of(fields)
    assert message in str(caught.value)


def test_each_mode_has_the_papers_share():
    assert MEAPOptions().ratio == 0.15
    assert MEAPOptions(mode="sft").ratio == 0.1
    assert MEAPOptions(mode="sft", mask_ratio=0.3).ratio == 0.3
    assert MEAPOptions.authors(mask_ratio=0.1).seed_cycle == 51


@pytest.mark.parametrize("keys", ["uniform", "clustered"])
def test_the_smallest_keys_are_found_also_where_they_lie_elsewhere_than_expected(keys):
    draws = np.random.default_rng(0)
    low, high = (-(1 << 63), (1 << 63) - 2) if keys == "uniform" else (1 << 60, (1 << 60) + 10**6)
    many = draws.integers(low, high, (7, 3000))
    many[3, 100:] = selection.NEVER  # not eligible
    count_B = np.array([3000, 3000, 3000, 100, 3000, 3000, 3000])
    thresholds = [np.sort(row)[int(0.15 * count) - 1] for row, count in zip(many, count_B, strict=True)]
    wanted = many <= np.array(thresholds)[:, None]
    found = selection._smallest(many, count_B, 3000 * np.arange(1, 8), 0.15)
    np.testing.assert_array_equal(found, np.flatnonzero(wanted))
    is_real = np.arange(3000) < count_B[:, None]
    found = selection._smallest(many[is_real], count_B, np.cumsum(count_B), 0.15)
    np.testing.assert_array_equal(found, np.flatnonzero(wanted[is_real]))


def test_one_long_run_between_many_short_ones_needs_no_matrix_of_both(monkeypatch):
    draws = np.random.default_rng(0)
    counts = np.array([1, 2, 0, 5000, *[1] * 3000, 7])
    stops, keys = np.cumsum(counts), draws.integers(-(1 << 63), (1 << 63) - 2, counts.sum())
    wanted = []
    for count, stop in zip(counts.tolist(), stops.tolist(), strict=True):
        order = np.argsort(keys[stop - count : stop])[: masking.masked_count(count, 0.5)]
        wanted += sorted((stop - count + order).tolist())
    matrices = []
    full = np.full
    monkeypatch.setattr(np, "full", lambda *more: matrices.append(more) or full(*more))
    assert selection._smallest(keys, counts, stops, 0.5).tolist() == wanted
    assert not matrices


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.15, 0.97, 1.0])
@pytest.mark.parametrize("exact_count", [True, False])
def test_runs_behind_one_another_choose_what_rows_of_a_matrix_do(ratio, exact_count, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 1000)
    noise = torch.Generator().manual_seed(3)
    allowed = torch.rand(40, 300, generator=noise) < torch.rand(40, 1, generator=noise)
    allowed[:, 7] = True
    allowed[5] = False
    tokens, counts = np.flatnonzero(allowed), allowed.sum(1).numpy()
    for seed in (0, -5, 2**63 - 1):
        wanted = np.flatnonzero(chosen(allowed, ratio, seed, exact_count=exact_count))
        begins = 300 * np.arange(40)
        found = selection.choose_in_runs(tokens, begins, counts, ratio, seed, exact_count=exact_count)
        np.testing.assert_array_equal(found, wanted)
    nothing = np.empty(0, np.int64)
    found = selection.choose_in_runs(nothing, nothing, nothing, ratio, 0, exact_count=exact_count)
    assert not len(found)
