"""The whole test-bed at one size and seed: a base and its fine-tunes, made once and kept.

    base            mixture "domains": the four domains; "all": domains and skills, with room above and below
                    each skill (`skill_base.py`)
    D_ S_ A_        fine-tunes of `testbed.FINETUNES`; flavour "mild": 3/4 own data and 1/4 replay of the
                    base's mixture (merging, tailoring), "hard": own data only (routing, where conflict must
                    exist)
    joint           control: one fine-tune on all domains for as many steps as the domains' fine-tunes
    together

Beds live in the user's cache folder, keyed by everything that decides their weights. Models are made under a
lock, two at a time in processes of one thread each, and appear by one rename; a killed build goes on where it
was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightsmith.errors import InputError, nearest
from weightsmith.runs.environment import cores, versions
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.processes import end_with_parent
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive
from weightsmith.testbed import DOMAINS, FINETUNES, SIZES, SKILLS, fingerprint
from weightsmith.training.config import FinetuneConfig, TrainConfig
from weightsmith.training.skill_base import mixture_for, train_skill_base

Flavour = Literal["mild", "hard"]
Mixture = Literal["domains", "all"]

REPLAY: Mapping[Flavour, float] = {"mild": 0.25, "hard": 0.0}
JOINT = "joint"
# What decides a checkpoint's weights besides the test-bed's own code.
_CODE = tuple(
    f"{name}.py"
    for name in ("bed", "callbacks", "data", "encoding", "loop", "skill_base", "sources", "trainer")
)


@dataclass(frozen=True)
class Bed:
    """A finished test-bed.

    Attributes:
        base: Folder of the base model.
        finetunes: Folder of each fine-tune, by name.
    """

    base: Path
    finetunes: dict[str, Path]


@dataclass(frozen=True)
class _Job:
    """One model to make, in a form that goes to another process."""

    config: TrainConfig
    model: str
    out: Path
    seed: int
    skills: bool = False  # a base that learns skills


def bed(
    size: str,
    seed: int,
    flavour: Flavour = "mild",
    which: Sequence[str] | None = None,
    *,
    mixture: Mixture = "domains",
    cache: str | Path | None = None,
    progress: Progress = SILENT,
    **overrides: int,
) -> Bed:
    """The test-bed, made as far as it is missing.

    Args:
        size: One of `testbed.SIZES`.
        seed: Decides everything random; evidence uses three or more.
        flavour: "mild" or "hard".
        which: Names of `testbed.FINETUNES`, and "joint"; all that fit the mixture by default.
        mixture: What the base is trained on.
        cache: Folder to keep beds in; `weightsmith/testbed` in the user's cache folder by default.
        progress: Told about each model.
        **overrides: `base_steps` or `finetune_steps`, for smoke tests.

    Raises:
        InputError: unknown size, fine-tune, flavour or mixture.
        SystemFault: no space, no permission.

    Example:
        >>> made = bed("xs", 0, which=["D_docs"], cache=tmp_path, base_steps=1, finetune_steps=1)
        >>> made.finetunes["D_docs"].name
        'D_docs-mild'
    """
    names = _checked(size, flavour, which, mixture)
    base_config, finetune_config = configs(size, mixture, **overrides)
    key = _key(base_config, seed)
    folder = Path(cache) if cache else cache_folder()
    folder = folder / f"{size}-{mixture}-{seed}-{key}"
    base = _Job(
        base_config, f"testbed/{size}", folder / "base", derive(seed, "base"), skills=mixture == "all"
    )
    jobs = {}
    for name in names:
        config = finetune_of(name, finetune_config, flavour, base_config)
        suffix = f"-{finetune_config.steps}" if "finetune_steps" in overrides else ""
        out = folder / f"{name}-{flavour}{suffix}"
        jobs[name] = _Job(config, str(base.out), out, derive(seed, name, flavour))
    missing = [job for job in (base, *jobs.values()) if not job.out.exists()]
    if missing:
        progress.start(f"test-bed {size}, seed {seed}", len(missing), "models")
        _make_all([job for job in missing if job is base], progress)
        _make_all([job for job in missing if job is not base], progress)
        progress.done()
    return Bed(base.out, {name: job.out for name, job in jobs.items()})


def configs(
    size: str, mixture: Mixture, *, base_steps: int | None = None, finetune_steps: int | None = None
) -> tuple[TrainConfig, FinetuneConfig]:
    """How the base of a bed is trained, and its fine-tunes apart from their data."""
    shape = SIZES[size]
    domains = TrainConfig(data=DOMAINS, steps=base_steps or BASE_STEPS[size], layer_drop=shape.layer_drop)
    finetune = FinetuneConfig(
        data=DOMAINS, steps=finetune_steps or FINETUNE_STEPS[mixture], layer_drop=shape.layer_drop
    )
    if mixture == "domains":
        return domains, finetune
    everything = dataclasses.replace(
        domains,
        data=mixture_for(dict.fromkeys(SKILLS, 0.0)),
        steps=base_steps or BASE_STEPS_ALL[size],
        learning_rate=0.288 / shape.hidden,  # half as much again as a plain run: lookups need it
    )
    return everything, finetune


def finetune_of(name: str, config: FinetuneConfig, flavour: Flavour, base: TrainConfig) -> FinetuneConfig:
    """The config of one fine-tune of a bed whose base was trained by `base`."""
    if name == JOINT:
        return dataclasses.replace(config, data=DOMAINS, steps=config.steps * len(DOMAINS))
    own = FINETUNES[name]
    return dataclasses.replace(config, data=own, replay=REPLAY[flavour], replay_data=base.data)


def cache_folder() -> Path:
    """Where beds are kept: `$XDG_CACHE_HOME/weightsmith/testbed`, or the same under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "weightsmith" / "testbed"


def _checked(size: str, flavour: str, which: Sequence[str] | None, mixture: str) -> tuple[str, ...]:
    fitting = (*(name for name in FINETUNES if name.startswith("D_") or mixture == "all"), JOINT)
    for word, value, choices in (
        ("size", size, tuple(SIZES)),
        ("flavour", flavour, tuple(REPLAY)),
        ("mixture", mixture, ("domains", "all")),
        *(("fine-tune", name, fitting) for name in which or ()),
    ):
        if value not in choices:
            raise InputError(
                f"test-bed: no {word} `{value}`{nearest(value, choices)}; known: {', '.join(choices)}"
            )
    return fitting if which is None else tuple(which)


def _key(base: TrainConfig, seed: int) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for file in _CODE:
        digest.update((Path(__file__).parent / file).read_bytes())
    facts = [fingerprint(), dataclasses.asdict(base), seed, versions(("torch", "transformers", "numpy"))]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _make_all(jobs: list[_Job], progress: Progress) -> None:
    if not jobs:
        return
    count = min(2, cores(), len(jobs))
    with ProcessPoolExecutor(count, mp_context=_context(), initializer=end_with_parent) as pool:
        for done in as_completed([pool.submit(_make, job) for job in jobs]):
            done.result()
            progress.advance(1)


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """A server that imports torch once and forks every worker from itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightsmith.training.trainer"])
    return context


def _make(job: _Job) -> None:
    from weightsmith.training.loop import finetune, train

    with FolderLock(job.out.parent, name=f".locks/{job.out.name}"):
        if job.out.exists():  # another process made it while we waited
            return
        workdir = job.out.parent / ".work" / job.out.name
        if job.skills:
            train_skill_base(job.config, job.model, job.out, workdir=workdir, seed=job.seed)
        elif isinstance(job.config, FinetuneConfig):
            finetune(job.config, job.model, job.out, workdir=workdir, seed=job.seed)
        else:
            train(job.config, job.model, job.out, workdir=workdir, seed=job.seed)


BASE_STEPS: Mapping[str, int] = {"xs": 500, "s": 800, "m": 2000}
BASE_STEPS_ALL: Mapping[str, int] = {"xs": 5000, "s": 5000, "m": 5000}
FINETUNE_STEPS: Mapping[Mixture, int] = {"domains": 150, "all": 250}
