"""The base of the skills bed: trained in short rounds, so that it ends with room above and below each skill.

A skill switches on within a few hundred steps, at a step that differs from seed to seed and from skill to
skill: no fixed mixture and number of steps leaves all six half-learnt. So after each round the skills are
scored on the calibration pool, and a skill's share of the next round is what it still lacks. When all of them
have left chance behind, the learning rate falls to its end within a few more rounds, in which every skill
still gains, some of them all there was to gain. Then those rounds are taken back, and the base goes on as if
they had not been.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from weightsmith.evaluation import evaluate
from weightsmith.runs.atomic import sync_folder
from weightsmith.runs.seeds import derive
from weightsmith.testbed import DOMAINS, SKILLS, chance
from weightsmith.training.config import FinetuneConfig, TrainConfig
from weightsmith.training.loop import finetune, train
from weightsmith.training.sources import DataSource

ROUND_STEPS = 50
FALL = (0.75, 0.5, 0.25, 0.1)  # of the learning rate, in the last rounds
SKILL_SHARE = 0.75  # of the mixture, for all skills; the domains have the rest
MOST = 0.3  # of the mixture, for one skill: with more, the last ones would be mastered within a round
# Skills against each other: most for those that take longest to learn.
SHARES = {"add": 1.2, "reverse": 0.7, "sort": 0.5, "lookup": 2.0, "maximum": 0.25, "count": 0.8}
LEAST = 0.1  # of its first share: without any, a skill would be forgotten
# Parts of the way from chance to mastery:
ENOUGH, TOO_MUCH = 0.1, 0.6  # all skills are between: the learning rate may fall
TARGET = 0.22  # a skill that is here is down to the least share
CEILING = 0.3  # above, it pauses: it will still gain while the learning rate falls
# Where every skill has to be in the end, so that the gate holds on other questions: above chance, and in all.
ABOVE_CHANCE, BELOW = 0.15, 0.70
ITEMS = 400  # questions of each skill after each round


def mixture_for(scores: Mapping[str, float]) -> tuple[DataSource, ...]:
    """The domains evenly, and each skill by what it lacks to `TARGET`.

    Args:
        scores: Exact match of every skill on the calibration pool.
    """
    learnt = {skill: _learnt(skill, value) for skill, value in scores.items()}
    lacking = {
        skill: SHARES[skill] * min(1.0, max(LEAST, 1 - part / TARGET))
        for skill, part in learnt.items()
        if part < CEILING
    }
    total = sum(lacking.values())
    skills = {skill: min(MOST, SKILL_SHARE * lack / total) for skill, lack in lacking.items()}
    shares = dict.fromkeys(DOMAINS, (1 - sum(skills.values())) / len(DOMAINS)) | skills
    return tuple(DataSource(source=name, weight=share) for name, share in shares.items())


def train_skill_base(
    config: TrainConfig, model: str | Path, out: str | Path, *, workdir: str | Path, seed: int
) -> None:
    """Train a base on domains and skills; a killed call goes on from its last round, and within it.

    Args:
        config: As for `train`; its data and learning rate are those of the first round, its steps the most
            that are made before the learning rate falls.
        model: What `train` starts from.
        out: Folder of the base; it appears when it is complete.
        workdir: Folder for the rounds.
        seed: Decides everything random.

    Raises:
        InputError, CheckpointError, SystemFault: as `train`.
    """
    out, workdir = Path(out), Path(workdir)
    steps = min(ROUND_STEPS, config.steps)
    this = dataclasses.replace(config, steps=steps, schedule="constant")
    last = max((_Round.of(folder) for folder in workdir.glob("round-*")), default=None)
    if last is None:
        last = _Round(0, 0)
        train(this, model, last.folder(workdir), workdir=workdir / "work", seed=derive(seed, 0))
    scores = _scores(last.folder(workdir))
    further = FinetuneConfig(**vars(this) | {"warmup_steps": 10})
    while True:
        spent = (last.number + 1) * steps >= config.steps
        if last.falls == len(FALL):
            if spent or _have_room(scores):
                break
            _remove(last.folder(workdir))
            last = _Round(last.number, 0)
            scores = _scores(last.folder(workdir))
            following = _Round(last.number + 1, 0)
        elif last.falls or spent or _may_fall(scores):
            following = _Round(last.number, last.falls + 1)
        else:
            following = _Round(last.number + 1, 0)
        rate = (config.learning_rate or 0.0) / math.sqrt(1 + (following.number + following.falls) / 16)
        if following.falls:
            rate *= FALL[following.falls - 1]
        this = dataclasses.replace(further, data=mixture_for(scores), learning_rate=rate)
        before, after = last.folder(workdir), following.folder(workdir)
        finetune(this, before, after, workdir=workdir / "work", seed=derive(seed, *following))
        if following.falls != 1:  # what the learning rate falls from is kept: the fall may be taken back
            _remove(before)
        last, scores = following, _scores(after)
    os.rename(last.folder(workdir), out)
    sync_folder(out.parent)
    shutil.rmtree(workdir)


class _Round(NamedTuple):
    """A finished round: its number, and how often the learning rate has fallen since."""

    number: int
    falls: int

    @classmethod
    def of(cls, folder: Path) -> _Round:
        number, falls = folder.name.removeprefix("round-").split(".")
        return cls(int(number), int(falls))

    def folder(self, workdir: Path) -> Path:
        return workdir / f"round-{self.number}.{self.falls}"


def _remove(folder: Path) -> None:
    """Remove a round, so that a killed call never finds half of it."""
    going = folder.with_name("removed")
    shutil.rmtree(going, ignore_errors=True)
    os.rename(folder, going)
    shutil.rmtree(going)


def _may_fall(scores: Mapping[str, float]) -> bool:
    return all(ENOUGH <= _learnt(skill, value) <= TOO_MUCH for skill, value in scores.items())


def _have_room(scores: Mapping[str, float]) -> bool:
    return all(chance(skill) + ABOVE_CHANCE <= value <= BELOW for skill, value in scores.items())


def _scores(model: Path) -> dict[str, float]:
    found = evaluate(model, list(SKILLS), "calibration", items=ITEMS)
    return {skill: score.value for skill, score in found.items()}


def _learnt(skill: str, score: float) -> float:
    """The part of the way from chance (0) to mastery (1)."""
    return (score - chance(skill)) / (1 - chance(skill))
