"""Several ranks that share the examples of each trial, against one process."""

import json

import pytest

EXAMPLES = 13


@pytest.fixture(scope="module")
def found(run_ranks):
    return run_ranks("tailoring.py")


def test_they_find_what_one_process_finds(found):
    first, second = found
    assert first["shared"] == second["shared"]
    assert first["shared"]["plan"] == first["alone"]["plan"]
    ours, alone = (json.loads(first[who]["trials"]) for who in ("shared", "alone"))
    assert [trial[:2] for trial in ours] == [trial[:2] for trial in alone]
    assert [trial[2] for trial in ours] == pytest.approx([trial[2] for trial in alone], abs=2e-6)
    assert len(ours) == 12


def test_every_rank_has_the_plan_and_can_build_it(found):
    assert found[0]["built"] == found[1]["built"] > 0


def test_examples_are_shared_and_none_is_scored_twice(found):
    first, second = (set(one["asked"]) for one in found)
    assert first
    assert second
    assert first | second == set(range(EXAMPLES))
    assert not first & second


def test_one_log_is_written_and_gone_on_with(found):
    assert [one["lines"] for one in found] == [13, 13]
    before, longer = (json.loads(text) for text in (found[1]["shared"]["trials"], found[1]["longer"]))
    assert len(longer) == 18
    assert longer[:12] == before


def test_what_the_first_rank_refuses_ends_the_others(found):
    first, second = (one["refused"] for one in found)
    assert "was made with seed = 0, this search has 1" in first
    assert second == f"the search ended on the first rank: {first}"


def test_a_wrong_score_on_any_rank_ends_all(found):
    first, second = (one["outside"] for one in found)
    assert first == "task `last`: scored 2.0, expected 0..1; wrap your metric: cost must be 1 - score"
    assert second == f"the search ended on the first rank: {first}"


def test_workers_of_their_own_are_refused(found):
    assert found[0]["workers"].startswith("workers: this is one of 2 ranks, which share each trial; expected")
