"""The sentences at the head of the page say what the numbers say, and no more."""

from __future__ import annotations

import pytest

from weightsmith.reports.findings import gate, headline
from weightsmith.reports.folder import read_run
from weightsmith.reports.scores import score_tables

from .made_runs import BITS, bits, quickstart, skills_of_a_users_models


@pytest.fixture
def told(tmp_path):
    """Headline and gate of the quickstart with some models' bits replaced."""

    def tell(**changed):
        made = quickstart(tmp_path / "run")
        made.scores("scores", {name: bits(values) for name, values in (BITS | changed).items() if values})
        run = read_run(made.folder)
        table = score_tables(run)[0]
        return " ".join(sentence.striptags() for sentence in headline(table)), gate(run, table)

    return tell


def test_the_winner_is_named_with_its_margin_over_the_base(told):
    words, _ = told(resm=(2.4, 2.3, 1.0, 1.5))
    assert words.startswith(
        "On the test split, resm has the lowest mean bits per character of 5 merges: 1.800 against 2.088 "
        "for the base (−13.8 %)."
    )
    assert "Next is tsvm with 1.941." in words


def test_a_lead_inside_the_noise_is_called_too_small(told):
    words, _ = told()
    assert "Its lead over tsvm (1.941) is too small to call from one run." in words
    assert "Next is" not in words


def test_a_loss_against_the_base_is_said_plainly(told):
    worse = {name: (2.9, 2.8, 1.4, 1.9) for name in ("uniform", "arithmetic", "ties", "tsvm", "resm")}
    words, _ = told(**worse)
    assert words.startswith(
        "On the test split, no merge beats the base on mean bits per character; the closest is"
    )


@pytest.mark.parametrize(
    ("joint", "verdict"),
    [
        ((2.4, 2.1, 0.9, 1.5), "is better still"),
        ((2.8, 2.6, 1.2, 1.7), "stays behind it"),
        (BITS["tsvm"], "is level with it"),
    ],
)
def test_the_joint_training_control_is_compared_with_the_best_merge(told, joint, verdict):
    words, _ = told(joint=joint)
    assert f"The joint-training control joint, which trained on all the data at once, {verdict}" in words


def test_without_a_control_none_is_mentioned(told):
    words, _ = told(joint=None)
    assert "control" not in words


def test_without_a_base_the_merge_is_held_against_the_best_other_model(tmp_path):
    table = score_tables(read_run(skills_of_a_users_models(tmp_path / "run").folder))[0]
    words = " ".join(sentence.striptags() for sentence in headline(table))
    assert (
        "the merge merged has 56.5 % mean exact match against 50.5 % for /data/llamas/Llama <3> & co" in words
    )
    assert "has 2.100 bits per character on docs against 2.000" in words


def test_without_merges_the_best_model_is_named(told):
    none = dict.fromkeys(("uniform", "arithmetic", "ties", "tsvm", "resm", "joint"))
    words, _ = told(**none)
    assert words == (
        "On the test split, english has the lowest mean bits per character of 5 models: 2.055 against 2.088 "
        "for the base (−1.6 %)."
    )


def test_the_gate_measures_fine_tunes_on_their_own_domain_and_arithmetic_on_the_mean(told):
    _, checks = told(code=(2.65, 2.7, 1.3, 1.75))
    assert [(check.what, check.change, check.passed) for check in checks] == [
        ("code on its own source", "−5.5 %", False),
        ("english on its own docs", "−13.0 %", True),
        ("codecs on its own tables", "−22.0 %", True),
        ("unicode on its own names", "−15.4 %", True),
        ("arithmetic, mean of 4 domains", "−6.1 %", True),
    ]
    assert [check.needed for check in checks] == ["−7 %"] * 4 + ["−4 %"]


def test_other_peoples_models_have_no_gate(tmp_path):
    run = read_run(skills_of_a_users_models(tmp_path / "run").folder)
    assert gate(run, score_tables(run)[0]) == []
