"""Mixtures of preference data: closed forms, equality with slow rules, bad input."""

import math
import random

import pytest

from weightsmith.alignment import (
    armorm_mixture,
    heuristic_mixture,
    hummer_mixture,
    hummer_weights,
)
from weightsmith.errors import InputError


def texts(*lengths):
    return [{"prompt": "p" * (length - 1), "answer": str(n % 10)} for n, length in enumerate(lengths)]


def tokens(rows):
    return sum(len(row["prompt"]) + len(row["answer"]) for row in rows)


def scorer(rows):
    """Rows carry their own scores."""
    return [row["scores"] for row in rows]


def scored(*pairs):
    return [{"id": n, "scores": {"help": a, "harmless": b}} for n, (a, b) in enumerate(pairs)]


# ---- heuristic


def test_equal_tokens_by_default_up_to_the_scarcest_objective():
    mixture = heuristic_mixture({"help": texts(*[10] * 100), "honest": texts(*[4] * 50)})
    assert (len(mixture.of("help")), len(mixture.of("honest"))) == (20, 50)
    assert mixture.weights == [1.0] * 70


def test_the_ratio_and_the_total_are_kept():
    sources = {"help": texts(*[5] * 200), "honest": texts(*[5] * 200), "harmless": texts(*[5] * 200)}
    mixture = heuristic_mixture(sources, weights={"help": 2, "honest": 1, "harmless": 1}, total=800)
    assert [tokens(mixture.of(name)) for name in sources] == [400, 200, 200]


def test_only_whole_rows_are_taken_and_at_least_one():
    mixture = heuristic_mixture({"help": texts(7, 7, 7), "honest": texts(100)}, total=30)
    assert tokens(mixture.of("help")) == 14
    assert len(mixture.of("honest")) == 1


def test_a_length_of_ones_own_counts_instead_of_characters():
    sources = {"help": texts(3, 90, 5, 60), "honest": texts(1, 1)}
    mixture = heuristic_mixture(sources, length=lambda row: 1)
    assert len(mixture.of("help")) == len(mixture.of("honest")) == 2


def test_nested_messages_count_with_all_their_characters():
    chat = [{"messages": [{"role": "user", "content": "abc"}]}] * 10  # 7 characters
    mixture = heuristic_mixture({"chat": chat, "plain": [{"text": "x" * 7}] * 4})
    assert len(mixture.of("chat")) == 4


def test_no_row_comes_twice_and_the_seed_decides():
    sources = {"help": [{"id": n, "t": "ab"} for n in range(40)], "honest": [{"id": 0, "t": "x" * 40}]}
    one, same, other = (heuristic_mixture(sources, seed=seed) for seed in (0, 0, 1))
    ids = [row["id"] for row in one.of("help")]
    assert len(set(ids)) == 20
    assert one == same
    assert set(ids) != {row["id"] for row in other.of("help")}


def test_a_hugging_face_data_set_is_read_like_a_list():
    datasets = pytest.importorskip("datasets")
    rows = texts(4, 4, 4, 4)
    table = datasets.Dataset.from_list(rows)
    mixture = heuristic_mixture({"help": table, "honest": rows})
    assert mixture == heuristic_mixture({"help": rows, "honest": rows})
    assert datasets.Dataset.from_list(mixture.rows).num_rows == 8


# ---- ArmoRM


def slow_quantile(values, value):
    below = sum(other < value for other in values)
    return (below + 0.5 * sum(other == value for other in values)) / len(values)


def test_on_all_a_row_is_as_good_as_its_worst_objective():
    rows = scored((9, -5), (3, 3), (4, 4), (-5, 9))
    mixture = armorm_mixture({"mixed": rows}, scorer, keep=0.5)
    assert {row["id"] for row in mixture.rows} == {1, 2}


def test_on_mean_the_gate_decides_between_extremes():
    rows = scored((9, -5), (3, 3), (-5, 9))
    best = {
        name: armorm_mixture({"mixed": rows}, scorer, on="mean", keep=0.3, gate={name: 1.0}).rows[0]["id"]
        for name in ("help", "harmless")
    }
    assert best == {"help": 0, "harmless": 2}


def test_a_gate_of_each_row_leaves_out_what_does_not_concern_it():
    rows = [{"id": n, "scores": {"help": a, "harmless": b}, "flag": f} for n, (a, b, f) in enumerate(
        [(9, -9, False), (1, 1, False), (-9, 9, True), (0, 0, True)]
    )]  # fmt: skip
    mixture = armorm_mixture(
        {"mixed": rows}, scorer, gate=lambda row: {"harmless" if row["flag"] else "help": 1.0}
    )
    assert {row["id"] for row in mixture.rows} == {0, 2}


def test_the_same_rows_stay_as_by_the_slow_rule():
    rng = random.Random(0)
    sources = {
        name: scored(*[(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(31)]) for name in ("a", "b")
    }
    everything = [row["scores"] for rows in sources.values() for row in rows]
    expected = set()
    for name, rows in sources.items():
        worst = [
            min(slow_quantile([s[o] for s in everything], row["scores"][o]) for o in ("help", "harmless"))
            for row in rows
        ]
        order = sorted(range(len(rows)), key=lambda n: (-worst[n], n))
        expected |= {(name, n) for n in order[: math.ceil(0.3 * len(rows))]}
    mixture = armorm_mixture(sources, scorer, keep=0.3)
    assert {(o, r["id"]) for o, r in zip(mixture.owners, mixture.rows, strict=True)} == expected


def test_scales_of_the_rewards_do_not_matter():
    rng = random.Random(1)
    pairs = [(rng.random(), rng.random()) for _ in range(40)]
    plain = armorm_mixture({"x": scored(*pairs)}, scorer)
    scaled = armorm_mixture({"x": scored(*[(1000 * a - 7, b**3) for a, b in pairs])}, scorer)
    assert [row["id"] for row in plain.rows] == [row["id"] for row in scaled.rows]


def test_temperature_weighs_rows_by_their_score_and_one_on_average():
    rows = scored((0, 0), (1, 1))
    mixture = armorm_mixture({"x": rows}, scorer, keep=1.0, temperature=0.5)
    by_id = {row["id"]: weight for row, weight in zip(mixture.rows, mixture.weights, strict=True)}
    assert by_id[1] / by_id[0] == pytest.approx(math.exp(0.5 / 0.5))  # quantiles 0.25 and 0.75
    assert sum(mixture.weights) == pytest.approx(2)


def test_keep_counts_within_each_objective():
    sources = {"good": scored(*[(9, 9)] * 10), "bad": scored(*[(0, 0)] * 5)}
    mixture = armorm_mixture(sources, scorer, keep=0.4)
    assert (len(mixture.of("good")), len(mixture.of("bad"))) == (4, 2)
    assert len(armorm_mixture(sources, scorer, keep=1.0)) == 15


# ---- Hummer


def test_rows_of_least_conflict_stay():
    rows = scored((5, -1), (0.1, 0), (-2, 3), (8, -4))
    mixture = hummer_mixture({"x": rows}, scorer, keep=0.5)
    assert {row["id"] for row in mixture.rows} == {0, 1}


def test_what_lacks_more_gets_more_by_the_written_rule():
    found = hummer_weights(
        {"help": 2, "honest": 1, "harmless": 1},
        {"help": 0.9, "honest": 0.2, "harmless": 0.5},
        {"help": 0.8, "honest": 0.4, "harmless": 0.5},
        rate=2.0,
        conflict=3.0,
        floor=0.0,
    )
    raw = {
        "help": 0.5 * math.exp(2 * 0.1),
        "honest": 0.25 * math.exp(2 * (0.8 + 3 * 0.2)),
        "harmless": 0.25 * math.exp(2 * 0.5),
    }
    for name, value in raw.items():
        assert found[name] == pytest.approx(value / sum(raw.values()))


def test_rate_nought_leaves_the_weights_and_the_floor_holds():
    assert hummer_weights({"a": 3, "b": 1}, {"a": 0.0, "b": 1.0}, rate=0, floor=0) == {"a": 0.75, "b": 0.25}
    found = hummer_weights({"a": 1, "b": 1}, {"a": 0.0, "b": 1.0}, rate=1000.0, floor=0.1)
    assert found == {"a": pytest.approx(0.9), "b": pytest.approx(0.1)}


def test_a_target_of_each_objective_counts():
    weights = {"a": 1, "b": 1}
    even = hummer_weights(weights, {"a": 0.3, "b": 0.6}, target={"a": 0.5, "b": 0.8})
    assert even["a"] == pytest.approx(0.5)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: heuristic_mixture({}), "no objective"),
        (lambda: heuristic_mixture({"help": []}), "`help` has no rows"),
        (lambda: heuristic_mixture({"help": texts(3)}, weights={"halp": 1}), "did you mean `help`"),
        (lambda: heuristic_mixture({"a": texts(3), "b": texts(3)}, weights={"a": 1}), "`b` is missing"),
        (lambda: heuristic_mixture({"a": texts(3)}, weights={"a": 0.0}), "`a` must be above 0, got 0"),
        (lambda: heuristic_mixture({"a": texts(3)}, total=10), r"expected 1..3 tokens .* got 10"),
        (lambda: heuristic_mixture({"a": [{"n": 3}]}), "row 0 of `a` has length 0"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, lambda rows: []), "0 scores for 1 rows"),
        (lambda: armorm_mixture({"a": scored((1, math.nan))}, scorer), "row 0 scored nan on `harmless`"),
        (lambda: armorm_mixture({"a": [1, 2]}, lambda rows: [{"x": 1}, {"y": 1}]), "row 1 has scores"),
        (lambda: armorm_mixture({"a": [1]}, lambda rows: [{}]), "row 0 has no score"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, keep=0), r"keep: expected in \(0, 1\]"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, temperature=0), "temperature: expected above"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, on="any"), "on: expected all or mean"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, gate={"hlep": 1}), "did you mean `help`"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, gate={"help": -1}), "`help` of row 0 is -1"),
        (lambda: armorm_mixture({"a": scored((1, 1))}, scorer, gate={"help": 0}), "every objective to 0"),
        (lambda: hummer_mixture({"a": scored((1, 1))}, scorer, keep=2), "keep: expected"),
        (lambda: hummer_weights({"a": 1}, {"b": 1}), "now: no objective `b`"),
        (lambda: hummer_weights({"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 1}), "before: objective `b`"),
        (lambda: hummer_weights({"a": 1}, {"a": 1}, rate=-1), "rate: expected 0 or more"),
        (lambda: hummer_weights({"a": 1, "b": 1}, {"a": 1, "b": 1}, floor=0.5), "floor: expected in"),
        (lambda: hummer_weights({"a": 1}, {"a": math.nan}), "must be finite"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_it(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
