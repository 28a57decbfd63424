"""One stage, from lock to record: what runs in a stage's process, and in tests in this one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.recipes.record import (
    Record,
    content_digest,
    is_intact,
    prepare,
    read_record,
    tidy,
    write_record,
)
from weightsmith.recipes.stages.contract import Workspace, plain
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.memory import peak_rss_bytes
from weightsmith.runs.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one stage needs to run, in a form that can be sent to another process.

    Attributes:
        stage: Its name.
        config: Its config object.
        models: Folder of each model it reads, by the page's word for it.
        inputs: Content fingerprint of each.
        run: The run's folder.
        fingerprint: The stage's fingerprint.
        seed: The stage's seed.
        predicted: What the plan said it would cost, for the record.
    """

    stage: str
    config: Any
    models: Mapping[str, Path]
    inputs: Mapping[str, str]
    run: Path
    fingerprint: str
    seed: int
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.run / "stages" / self.stage


def execute(job: Job, progress: Progress, say: Callable[[str], None] = log.info) -> Record:
    """Run a stage unless it is done; the record is on disk when this returns.

    A lock of its own keeps out an orphan of a killed run that has not died yet.

    Raises:
        WeightsmithError: bad input or a fault of the machine, as the stage tells it.
    """
    with FolderLock(job.run, name=f".locks/{job.stage}", on_wait=say):
        record = read_record(job.folder)
        if record and record.fingerprint == job.fingerprint and is_intact(job.folder, record):
            tidy(job.folder, record)
            return record
        started = time.perf_counter()
        if prepare(job.folder, job.fingerprint):
            say(f"{job.stage}: going on where it was stopped")
        workspace = Workspace(job.folder, job.stage, job.seed)
        done = job.config.run(job.models, workspace, progress)
        record = Record(
            stage=job.stage,
            kind=job.config.kind,
            config=plain(done.config),
            inputs=dict(job.inputs),
            fingerprint=job.fingerprint,
            seed=job.seed,
            outputs=dict(done.outputs),
            digests={name: content_digest(job.folder / path) for name, path in done.outputs.items()},
            seconds=round(time.perf_counter() - started, 3),
            peak_bytes=peak_rss_bytes(),
            predicted=dict(job.predicted),
        )
        write_record(job.folder, record)
        tidy(job.folder, record)
        return record
