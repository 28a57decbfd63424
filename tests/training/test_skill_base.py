"""The skills bed's base: each round's mixture follows what the skills lack, and a kill costs nothing."""

import dataclasses
from types import SimpleNamespace

import pytest

from weightsmith.checkpoints.lineage import read_lineage
from weightsmith.testbed import DOMAINS, SKILLS, chance
from weightsmith.training import TrainConfig, skill_base
from weightsmith.training.skill_base import (
    CEILING,
    FALL,
    LEAST,
    MOST,
    SKILL_SHARE,
    TARGET,
    mixture_for,
    train_skill_base,
)

CONFIG = TrainConfig(data=mixture_for(dict.fromkeys(SKILLS, 0.0)), steps=8, batch_size=2, learning_rate=1e-3)


def shares(**scores):
    """Each source's share by name, relative to its share when nothing is learnt."""
    first, found = (
        {source.source: source.weight for source in mixture_for({**dict.fromkeys(SKILLS, 0.0), **known})}
        for known in ({}, scores)
    )
    assert sum(found.values()) == pytest.approx(1)
    # Relative to a skill that has learnt nothing: the shares of all others grow when one falls.
    return {name: found[name] / first[name] * first["add"] / found["add"] for name in found}


def test_domains_have_what_skills_leave():
    even = mixture_for(dict.fromkeys(SKILLS, 0.0))
    assert [source.weight for source in even if source.source in DOMAINS] == pytest.approx(
        [(1 - SKILL_SHARE) / len(DOMAINS)] * len(DOMAINS)
    )
    one = mixture_for({**dict.fromkeys(SKILLS, 1.0), "add": 0.0})
    assert {source.source: source.weight for source in one}["add"] == MOST


def at(skill, part):
    """The score at a part of the way from chance to mastery."""
    return {skill: chance(skill) + part * (1 - chance(skill))}


def test_a_skill_half_way_to_the_target_has_half_its_share():
    assert shares(**at("maximum", TARGET / 2))["maximum"] == pytest.approx(0.5)


def test_a_skill_at_the_target_keeps_a_little_and_above_the_ceiling_nothing():
    assert shares(**at("count", TARGET))["count"] == pytest.approx(LEAST)
    assert shares(**at("count", CEILING - 0.01))["count"] == pytest.approx(LEAST)
    assert "count" not in shares(**at("count", CEILING + 1e-9))


def test_when_all_skills_are_learnt_the_domains_have_everything():
    found = mixture_for(dict.fromkeys(SKILLS, 1.0))
    assert {source.source: source.weight for source in found} == dict.fromkeys(DOMAINS, 0.25)


@pytest.fixture
def short(monkeypatch):
    """Rounds of two steps."""
    monkeypatch.setattr(skill_base, "ROUND_STEPS", 2)
    monkeypatch.setattr(skill_base, "ITEMS", 4)


def scored(monkeypatch, *rounds):
    """Let every skill be this far on its way whenever it is asked, and as last told from then on."""
    told = list(rounds)

    def evaluate(*args, **options):
        part = told.pop(0) if len(told) > 1 else told[0]
        parts = part if isinstance(part, dict) else dict.fromkeys(SKILLS, part)
        return {skill: SimpleNamespace(value=at(skill, parts[skill])[skill]) for skill in SKILLS}

    monkeypatch.setattr(skill_base, "evaluate", evaluate)


def lineages_of(base):
    """Each round that led to a base."""
    lineages = [read_lineage(base)]
    while lineages[0].inputs:
        lineages.insert(0, lineages[0].inputs[0].lineage)
    return lineages


def rates_of(base):
    """The learning rate of each round that led to a base, relative to the first and to the slow decline."""
    lineages = lineages_of(base)
    assert {lineage.parameters["steps"] for lineage in lineages} == {2}
    rates = [lineage.parameters["learning_rate"] for lineage in lineages]
    return [rate / 1e-3 * (1 + number / 16) ** 0.5 for number, rate in enumerate(rates)]


HALF, ALL, NONE = 0.4, 1.0, 0.0


@pytest.mark.parametrize(
    ("parts", "rates"),
    [
        ((NONE, NONE, HALF), [1.0, 1.0, 1.0, *FALL]),  # falls when there is enough
        ((HALF,), [1.0, *FALL]),
        ((ALL, HALF), [1.0, 1.0, *FALL]),  # and not too much
        ((NONE,), [1.0, 1.0, 1.0, 1.0, *FALL]),  # or when the steps are spent
    ],
)
def test_the_learning_rate_falls_when_all_skills_have_left_chance(short, parts, rates, tmp_path, monkeypatch):
    scored(monkeypatch, *parts)
    train_skill_base(CONFIG, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    assert rates_of(tmp_path / "base") == pytest.approx(rates)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("end", [ALL, NONE])
def test_a_fall_that_leaves_no_room_is_taken_back(short, end, tmp_path, monkeypatch):
    # One round, four of the fall, then what the first round scored, and a second one that is good for a fall.
    scored(monkeypatch, HALF, HALF, HALF, HALF, end, HALF, HALF)
    train_skill_base(CONFIG, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    assert rates_of(tmp_path / "base") == pytest.approx([1.0, 1.0, *FALL])


def steps_of(base):
    return [lineage.parameters["steps"] for lineage in lineages_of(base)]


EARLY = {**dict.fromkeys(SKILLS, HALF), "reverse": ALL, "add": NONE}
LATE = {**dict.fromkeys(SKILLS, HALF), "add": NONE}


@pytest.fixture
def longer(short, monkeypatch):
    """Rounds of eight steps."""
    monkeypatch.setattr(skill_base, "ROUND_STEPS", 8)
    return dataclasses.replace(CONFIG, steps=32)


def test_a_round_in_which_a_skill_is_mastered_is_made_again_with_half_the_steps(
    longer, tmp_path, monkeypatch
):
    # The first round; the second with all its steps, a half, a quarter; a third.
    scored(monkeypatch, NONE, EARLY, EARLY, LATE, HALF)
    train_skill_base(longer, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    assert steps_of(tmp_path / "base") == [8, 2, *[8] * (1 + len(FALL))]


def test_after_three_halvings_a_skill_may_be_mastered(longer, tmp_path, monkeypatch):
    scored(monkeypatch, NONE, EARLY, EARLY, EARLY, EARLY, HALF)
    train_skill_base(longer, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    assert steps_of(tmp_path / "base") == [8, 1, *[8] * (1 + len(FALL))]


def test_a_skill_that_is_mastered_though_it_got_nothing_is_let_be(longer, tmp_path, monkeypatch):
    scored(monkeypatch, LATE, EARLY, HALF)  # above the ceiling, so without a share
    train_skill_base(longer, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    assert steps_of(tmp_path / "base") == [8] * (3 + len(FALL))


def by_what_was_trained(base, *args, **options):
    """Scores of a round, from what went before it: in the second, two steps are too many for `reverse`."""
    steps = steps_of(base)
    parts = dict.fromkeys(SKILLS, HALF if len(steps) > 2 else NONE)
    if len(steps) == 2:
        parts["reverse"] = ALL if steps[-1] == 2 else HALF
    if len(steps) == 7:  # the end of the first fall
        parts["sort"] = ALL
    return {skill: SimpleNamespace(value=at(skill, part)[skill]) for skill, part in parts.items()}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("at_round", [2, 7])
def test_a_killed_base_goes_on_from_its_last_round(short, at_round, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(skill_base, "evaluate", by_what_was_trained)
    train_skill_base(CONFIG, "testbed/xs", tmp_path / "whole", workdir=tmp_path / "work", seed=0)
    assert steps_of(tmp_path / "whole") == [2, 1, *[2] * (2 + len(FALL))]

    calls = 0
    dying = "keep" if kept else "finetune"
    owner = skill_base._Round if kept else skill_base
    whole = getattr(owner, dying)

    def die_after(*args, **options):
        nonlocal calls
        calls += 1
        whole(*args, **options)
        if calls == at_round:
            raise KeyboardInterrupt

    arguments = (CONFIG, "testbed/xs", tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(owner, dying, die_after)
        with pytest.raises(KeyboardInterrupt):
            train_skill_base(*arguments, workdir=tmp_path / "work", seed=0)

    def never(*args, **options):
        raise AssertionError("the first round is there")

    monkeypatch.setattr(skill_base, "train", never)
    train_skill_base(*arguments, workdir=tmp_path / "work", seed=0)
    for file in ("model.safetensors", "weightsmith.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
