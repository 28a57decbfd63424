"""The skills bed's base: each round's mixture follows what the skills lack, and a kill costs nothing."""

import dataclasses
from types import SimpleNamespace

import pytest

from weightsmith.checkpoints.lineage import read_lineage
from weightsmith.testbed import DOMAINS, SKILLS, chance
from weightsmith.training import TrainConfig, skill_base
from weightsmith.training.skill_base import (
    FALL,
    LEAST,
    MOST,
    SKILL_SHARE,
    TARGET,
    mixture_for,
    train_skill_base,
)

CONFIG = TrainConfig(data=mixture_for(dict.fromkeys(SKILLS, 0.0)), steps=8, batch_size=2, learning_rate=1e-3)


def shares(*paused, **scores):
    """Each source's share by name, relative to its share when nothing is learnt."""
    first, found = (
        {s.source: s.weight for s in mixture_for({**dict.fromkeys(SKILLS, 0.0), **known}, without)}
        for known, without in (({}, ()), (scores, paused))
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


def test_a_skill_at_the_target_keeps_a_little_and_a_paused_one_nothing():
    assert shares(**at("count", TARGET))["count"] == pytest.approx(LEAST)
    assert shares(**at("count", 0.9))["count"] == pytest.approx(LEAST)
    assert "count" not in shares("count")


def test_when_all_skills_pause_the_domains_have_everything():
    found = mixture_for(dict.fromkeys(SKILLS, 1.0), SKILLS)
    assert {source.source: source.weight for source in found} == dict.fromkeys(DOMAINS, 0.25)


@pytest.fixture
def short(monkeypatch):
    """Rounds of two steps."""
    monkeypatch.setattr(skill_base, "ROUND_STEPS", 2)
    monkeypatch.setattr(skill_base, "ITEMS", 4)


def scored(monkeypatch, *rounds):
    """Let every skill score as told after each round, and as last told from then on."""
    values = list(rounds)

    def evaluate(*args, **options):
        value = values.pop(0) if len(values) > 1 else values[0]
        return {skill: SimpleNamespace(value=value) for skill in SKILLS}

    monkeypatch.setattr(skill_base, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("scores", "rates"),
    [
        ((0.0, 0.0, 0.6), [1.0, 1.0, 1.0, *FALL]),  # falls when there is enough
        ((0.6, 0.0), [1.0, *FALL]),  # and goes on falling
        ((0.0,), [1.0, 1.0, 1.0, 1.0, *FALL]),  # or when the steps are spent
    ],
)
def test_the_learning_rate_falls_when_all_skills_have_left_chance(
    short, scores, rates, tmp_path, monkeypatch
):
    scored(monkeypatch, *scores)
    train_skill_base(CONFIG, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    lineages = [read_lineage(tmp_path / "base")]
    while lineages[0].inputs:
        lineages.insert(0, lineages[0].inputs[0].lineage)
    found = [lineage.parameters["learning_rate"] for lineage in lineages]
    assert found == pytest.approx([1e-3 * rate / (1 + n / 16) ** 0.5 for n, rate in enumerate(rates)])
    assert {lineage.parameters["steps"] for lineage in lineages} == {2}
    assert not (tmp_path / "work").exists()


def test_a_round_that_brings_a_skill_too_far_is_made_again_without_it(short, tmp_path, monkeypatch):
    trained = []
    learns = skill_base.finetune

    def finetune(config, *arguments, **options):
        trained.append({source.source for source in config.data} & set(SKILLS))
        learns(config, *arguments, **options)

    def evaluate(*arguments, **options):
        # `add` and then `sort` are mastered in whatever round has them after the first.
        known = {"add"} & trained[-1] or {"sort"} & trained[-1] if trained else set()
        return {skill: SimpleNamespace(value=float(skill in known)) for skill in SKILLS}

    monkeypatch.setattr(skill_base, "finetune", finetune)
    monkeypatch.setattr(skill_base, "evaluate", evaluate)
    one = dataclasses.replace(CONFIG, steps=2)
    train_skill_base(one, "testbed/xs", tmp_path / "base", workdir=tmp_path / "work", seed=0)
    every = set(SKILLS)
    assert trained == [every, every - {"add"}, every - {"add", "sort"}] * len(FALL)
    lineage, rounds = read_lineage(tmp_path / "base"), 0
    while lineage.inputs:
        sources = {source["source"] for source in lineage.parameters["data"]}
        assert not sources & {"add", "sort"}
        lineage, rounds = lineage.inputs[0].lineage, rounds + 1
    assert rounds == len(FALL)  # what was not kept is no ancestor


def test_a_killed_base_goes_on_from_its_last_round(short, tmp_path, monkeypatch):
    train_skill_base(CONFIG, "testbed/xs", tmp_path / "whole", workdir=tmp_path / "work", seed=0)

    def die(*args, **options):
        raise KeyboardInterrupt

    arguments = (CONFIG, "testbed/xs", tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(skill_base, "finetune", die)
        with pytest.raises(KeyboardInterrupt):
            train_skill_base(*arguments, workdir=tmp_path / "work", seed=0)
    monkeypatch.setattr(skill_base, "train", die)  # the first round is there
    train_skill_base(*arguments, workdir=tmp_path / "work", seed=0)
    for file in ("model.safetensors", "weightsmith.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
