"""The base of the skills bed: trained in short rounds, so that it ends with room above and below each skill.

A skill switches on within a few hundred steps, at a step that differs from seed to seed and from skill to
skill: no fixed mixture and number of steps leaves all six half-learnt. So after each round the skills are
scored on the calibration pool, and a skill's share of the next round is what it still lacks. When all of them
have left chance behind, the learning rate falls to its end within a few more rounds, in which every skill
still gains, some of them all there was to gain. Then those rounds are taken back, and the base goes on as if
they had not been. So is a round in which a skill was mastered all at once: it is made again with half the
steps.
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
from weightsmith.runs.atomic import read_json, sync_folder, write_json
from weightsmith.runs.seeds import derive
from weightsmith.testbed import DOMAINS, SKILLS, chance
from weightsmith.training.config import FinetuneConfig, TrainConfig
from weightsmith.training.loop import finetune, train
from weightsmith.training.sources import DataSource

ROUND_STEPS = 50
MOST_HALVINGS = 3  # of a round's steps
FALL = (0.75, 0.5, 0.25, 0.1)  # of the learning rate, in the last rounds
SKILL_SHARE = 0.75  # of the mixture, for all skills; the domains have the rest
MOST = 0.5  # of the mixture, for one skill: the domains must not be forgotten for the last one
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
    further = FinetuneConfig(**vars(this) | {"warmup_steps": 10})
    last = _Round.read(workdir)
    if last is None:
        last = _Round()
        train(this, model, last.folder(workdir), workdir=workdir / "work", seed=derive(seed, 0, 0))
    last.keep(workdir)
    scores = _scores(last.folder(workdir))
    while True:
        spent = (last.number + 1) * steps >= config.steps
        if last.falls == len(FALL):
            if spent or _have_room(scores):
                break
            last = last._replace(falls=0, fell=True)
            last.keep(workdir)
            scores = _scores(last.folder(workdir))
            continue
        if last.falls or spent or (_may_fall(scores) and not last.fell):
            following = last._replace(falls=last.falls + 1)
        else:
            following = last._replace(number=last.number + 1, fell=False)
        rate = (config.learning_rate or 0.0) / math.sqrt(1 + (following.number + following.falls) / 16)
        if following.falls:
            rate *= FALL[following.falls - 1]
        data = mixture_for(scores)
        this = dataclasses.replace(further, data=data, learning_rate=rate, steps=max(1, steps >> last.halved))
        before, after = last.folder(workdir), following.folder(workdir)
        own_seed = derive(seed, following.number, following.falls)
        finetune(this, before, after, workdir=workdir / "work", seed=own_seed)
        found = _scores(after)
        learnt = {skill: _learnt(skill, value) for skill, value in found.items()}
        mastered = any(learnt.get(source.source, 0.0) > TOO_MUCH for source in data)
        if mastered and not following.falls and last.halved < MOST_HALVINGS:
            last = last._replace(halved=last.halved + 1)
        else:
            last, scores = following._replace(halved=0), found
        last.keep(workdir)
    os.rename(last.folder(workdir), out)
    sync_folder(out.parent)
    shutil.rmtree(workdir)


class _Round(NamedTuple):
    """A finished round.

    Attributes:
        number: How many went before, those of a fall not counted.
        falls: How often the learning rate has fallen since.
        halved: How often the steps of the next round were halved, because a skill was mastered in it.
        fell: Whether the learning rate has fallen from here, and left no room.
    """

    number: int = 0
    falls: int = 0
    halved: int = 0
    fell: bool = False

    @classmethod
    def read(cls, workdir: Path) -> _Round | None:
        """The last one that was kept."""
        file = workdir / "round.json"
        return cls(**read_json(file)) if file.exists() else None

    def folder(self, workdir: Path) -> Path:
        return workdir / f"round-{self.number}.{self.falls}"

    def keep(self, workdir: Path) -> None:
        """Note that a killed call goes on from here; remove the rounds that nothing will start from."""
        write_json(workdir / "round.json", self._asdict())
        start = self._replace(falls=0)  # a fall may be taken back
        needed = {self.folder(workdir), start.folder(workdir)}
        for folder in set(workdir.glob("round-*")) - needed:
            shutil.rmtree(folder)


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
