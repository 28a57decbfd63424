"""From a stage of a page to a job: where its models are and what stands for their content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.recipes.fingerprint import code_version, digest, file_digest, stage_fingerprint
from weightsmith.recipes.models import TESTBED
from weightsmith.recipes.page import Page
from weightsmith.recipes.record import Record, content_digest, is_intact, read_record
from weightsmith.recipes.stages import KINDS
from weightsmith.recipes.stages.contract import Entry
from weightsmith.recipes.worker import Job
from weightsmith.runs.seeds import derive


class Inputs:
    """Finds the models of a page's stages; each outside model is opened and hashed once.

    Args:
        page: The recipe.
        folder: Folder of its run.
    """

    def __init__(self, page: Page, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self._outside: dict[tuple[str, bool], tuple[Path, str]] = {}

    def job(self, entry: Entry, records: Mapping[str, Record]) -> Job:
        """The job of a stage whose earlier stages have the given records.

        Raises:
            CheckpointError: a model from outside is no readable checkpoint.
        """
        models, digests = {}, {}
        for reference in entry.config.references():
            value = reference.value
            if value in self.page.stages:
                models[value] = self.folder / "stages" / value / records[value].outputs[reference.output]
                digests[value] = records[value].digests[reference.output]
            elif self.is_testbed(value):
                digests[value] = value  # its content follows from the code, which counts already
            else:
                models[value], digests[value] = self.outside(value, entry.config.needs_weights)
        seed = derive(self.page.seed, entry.name)
        fingerprint = stage_fingerprint(
            kind=entry.kind,
            config=entry.config.identity(),
            inputs=digests,
            data=entry.config.data_fingerprint(),
            code=code_version(KINDS[entry.kind].partition(":")[0]),
            seed=seed,
        )
        return Job(
            stage=entry.name,
            config=entry.config,
            models=models,
            inputs=digests,
            run=self.folder,
            fingerprint=fingerprint,
            seed=seed,
        )

    def finished(self, job: Job) -> Record | None:
        """The record of a job that is done and whose outputs are as they were; else None."""
        record = read_record(job.folder)
        if record and record.fingerprint == job.fingerprint and is_intact(job.folder, record):
            return record
        return None

    def outside(self, value: str, needs_weights: bool) -> tuple[Path, str]:
        """Folder and content fingerprint of a local folder or hub id; of its weights only where they count.

        Raises:
            CheckpointError: it is no readable checkpoint.
        """
        key = (value, needs_weights)
        if key not in self._outside:
            from weightsmith.checkpoints.folder import resolve, side_files

            folder, _ = resolve(value)
            if needs_weights:
                content = content_digest(folder)
            else:
                content = digest({name: file_digest(file) for name, file in side_files(folder).items()})
            self._outside[key] = folder, content
        return self._outside[key]

    def is_testbed(self, value: str) -> bool:
        """Whether a model is a size of the test-bed, which has no folder until a stage makes one."""
        return value.startswith(TESTBED) and not Path(value).exists()
