"""The base of the skills bed: trained in short rounds, so that it ends with room above and below each skill.

A skill switches on within a few hundred steps, at a step that differs from seed to seed and from skill to
skill: no fixed mixture and number of steps leaves all six half-learnt. So after each round the skills are
scored on the calibration pool, and a skill's share of the next round is what it still lacks. A round that
brought a skill too far is made again without it. When all of them have left chance behind, the learning rate
falls to its end within a few more rounds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Collection, Mapping
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
ENOUGH = 0.18  # all skills are here: the learning rate may fall
TARGET = 0.22  # a skill that is here is down to the least share
CEILING = 0.3  # above, it pauses: it will still gain while the learning rate falls
TOO_MUCH = 0.6  # a round that brings a skill beyond is not kept
ITEMS = 400  # questions of each skill after each round


def mixture_for(scores: Mapping[str, float], paused: Collection[str] = ()) -> tuple[DataSource, ...]:
    """The domains evenly, and each skill by what it lacks to `TARGET`.

    Args:
        scores: Exact match of every skill on the calibration pool.
        paused: Skills that get nothing.
    """
    lacking = {
        skill: SHARES[skill] * min(1.0, max(LEAST, 1 - _learnt(skill, value) / TARGET))
        for skill, value in scores.items()
        if skill not in paused
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
    while last.falls < len(FALL):
        enough = all(_learnt(skill, value) >= ENOUGH for skill, value in scores.items())
        number = last.number + 1
        falls = last.falls + (enough or last.falls > 0 or number * steps >= config.steps)
        rate = (config.learning_rate or 0.0) / math.sqrt(1 + number / 16)
        if falls:
            rate *= FALL[falls - 1]
        before, last = last.folder(workdir), _Round(number, falls)
        paused = {skill for skill, value in scores.items() if _learnt(skill, value) >= CEILING}
        trial = workdir / "trial"
        while True:
            shutil.rmtree(trial, ignore_errors=True)  # of a killed call
            this = dataclasses.replace(further, data=mixture_for(scores, paused), learning_rate=rate)
            finetune(this, before, trial, workdir=workdir / "work", seed=derive(seed, number, len(paused)))
            found = _scores(trial)
            over = {skill for skill, value in found.items() if _learnt(skill, value) > TOO_MUCH} - paused
            if not over:
                break
            paused |= over
        scores = found
        os.rename(trial, last.folder(workdir))
        shutil.rmtree(before)
    os.rename(last.folder(workdir), out)
    sync_folder(out.parent)
    shutil.rmtree(workdir)


class _Round(NamedTuple):
    """A finished round: its number, and how often the learning rate has fallen by then."""

    number: int
    falls: int

    @classmethod
    def of(cls, folder: Path) -> _Round:
        number, falls = folder.name.removeprefix("round-").split(".")
        return cls(int(number), int(falls))

    def folder(self, workdir: Path) -> Path:
        return workdir / f"round-{self.number}.{self.falls}"


def _scores(model: Path) -> dict[str, float]:
    found = evaluate(model, list(SKILLS), "calibration", items=ITEMS)
    return {skill: score.value for skill, score in found.items()}


def _learnt(skill: str, score: float) -> float:
    """The part of the way from chance (0) to mastery (1)."""
    return (score - chance(skill)) / (1 - chance(skill))
