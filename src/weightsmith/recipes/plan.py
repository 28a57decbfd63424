"""What a run would do, before it does anything: reads, writes, memory, disk and time of every stage.

Stages are planned in order, each on the real outputs of finished stages and on stand-ins for those to come,
by the same code that will run them. Nothing is written to the run's folder and torch is not imported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from weightsmith.errors import InputError, PageError, SystemFault
from weightsmith.recipes.inputs import Inputs
from weightsmith.recipes.page import Page, load_page
from weightsmith.recipes.record import Record, is_resumable, read_record
from weightsmith.recipes.stages.contract import Entry, Forecast, Workspace
from weightsmith.runs.environment import cores
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.seeds import derive


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage will do.

    Attributes:
        stage: Its name.
        kind: Its kind.
        status: `run`, `resume` where a killed run left a beginning, `reuse` where it is done and its cost is
            what it took then. `run` may still become `reuse` when the stages above come out as they were.
        needs: The stages it waits for.
        reads: Models and data, in the page's words.
        writes: Its folder.
        prediction: Its cost.
        warnings: Lines the user should see.
    """

    stage: str
    kind: str
    status: Literal["run", "resume", "reuse"]
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    writes: Path
    prediction: Prediction
    warnings: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Predicted seconds of what is not done yet."""
        return 0.0 if self.status == "reuse" else self.prediction.seconds


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do: its stages in the page's order, `jobs` of them at once."""

    name: str
    folder: Path
    jobs: int
    stages: tuple[StagePlan, ...]

    @property
    def total(self) -> Prediction:
        """Cost of what is left to do: the `jobs` largest stages in memory and in scratch space together, all
        new disk, the whole time.
        """
        left = [stage for stage in self.stages if stage.status != "reuse"]
        largest = sorted((stage.prediction.memory_bytes for stage in left), reverse=True)
        return Prediction(
            memory_bytes=sum(largest[: self.jobs]),
            disk_bytes=sum(stage.prediction.disk_bytes for stage in left),
            seconds=_makespan(self.stages, self.jobs),
            scratch_bytes=sum(sorted((s.prediction.scratch_bytes for s in left), reverse=True)[: self.jobs]),
        )

    def check_disk(self) -> None:
        """Refuse a run that can't fit.

        Raises:
            SystemFault: less disk is free than the stages will write.
        """
        place = self.folder
        while not place.exists():
            place = place.parent
        disk = os.statvfs(place)
        free, total = disk.f_bavail * disk.f_frsize, self.total
        if free < total.disk_bytes + total.scratch_bytes:
            raise SystemFault(
                f"{self.folder}: the stages will write {total.disk_bytes / 1e9:.2f} GB and need "
                f"{total.scratch_bytes / 1e9:.2f} GB meanwhile, {free / 1e9:.2f} GB are free; "
                "nothing was started"
            )


def plan_run(page: Page | str | Path, *, root: str | Path = "runs", jobs: int | None = None) -> RunPlan:
    """Plan a recipe without starting anything.

    Args:
        page: The recipe, or its file.
        root: Folder of all runs.
        jobs: Stages to run at once; two, or one on a single core.

    Raises:
        PageError: the page is wrong.
        CheckpointError: a model from outside can't be read, or the models of a stage don't fit each other.
    """
    page = page if isinstance(page, Page) else load_page(page)
    folder = Path(root) / page.name
    with tempfile.TemporaryDirectory(prefix="weightsmith-plan-") as scratch:
        planner = _Planner(page, folder, Path(scratch))
        stages = tuple(planner.plan(entry) for entry in page.stages.values())
    return RunPlan(name=page.name, folder=folder, jobs=jobs or min(2, cores()), stages=stages)


class _Planner:
    def __init__(self, page: Page, folder: Path, scratch: Path) -> None:
        self.page, self.folder, self.scratch = page, folder, scratch
        self.inputs = Inputs(page, folder)
        self.records: dict[str, Record] = {}
        self.outputs: dict[str, dict[str, Path]] = {}

    def plan(self, entry: Entry) -> StagePlan:
        try:
            return self._plan(entry)
        except (
            InputError
        ) as wrong:  # what only the models' folders and headers tell: sizes, tokenizers, names
            raise PageError.at(self.page.path, entry.line, f"stages.{entry.name}", str(wrong)) from wrong

    def _plan(self, entry: Entry) -> StagePlan:
        status: Literal["run", "resume"] = "run"
        if all(name in self.records for name in entry.stages):
            job = self.inputs.job(entry, self.records)
            if record := self.inputs.finished(job):
                return self._reused(entry, record)
            status = "resume" if is_resumable(job.folder, job.fingerprint) else "run"
        forecast = self._forecast(entry)
        if forecast.model is not None:
            self.outputs[entry.name] = {
                "checkpoint": forecast.model,
                "states": forecast.model.parent / "states",
            }
        prediction = forecast.prediction
        if before := self._same_work(entry):
            prediction = replace(prediction, memory_bytes=before.peak_bytes, seconds=before.seconds)
        return StagePlan(
            stage=entry.name,
            kind=entry.kind,
            status=status,
            needs=entry.stages,
            reads=(*_models(entry), *forecast.reads),
            writes=self._folder(entry),
            prediction=prediction,
            warnings=forecast.warnings,
        )

    def _same_work(self, entry: Entry) -> Record | None:
        """An earlier run of the stage with the same config: what it took beats any prediction."""
        before = read_record(self._folder(entry))
        # What the page leaves open is filled in there.
        options = [(key, value) for key, value in entry.config.identity().items() if value is not None]
        return before if before and all(before.config.get(key) == value for key, value in options) else None

    def _reused(self, entry: Entry, record: Record) -> StagePlan:
        self.records[entry.name] = record
        self.outputs[entry.name] = {name: self._folder(entry) / path for name, path in record.outputs.items()}
        size = sum(_size(self._folder(entry) / path) for path in record.outputs.values())
        return StagePlan(
            stage=entry.name,
            kind=entry.kind,
            status="reuse",
            needs=entry.stages,
            reads=_models(entry),
            writes=self._folder(entry),
            prediction=Prediction(record.peak_bytes, size, record.seconds),
        )

    def _forecast(self, entry: Entry) -> Forecast:
        models = {}
        for reference in entry.config.references():
            value = reference.value
            if value in self.page.stages:
                models[value] = self.outputs[value][reference.output]
            elif not self.inputs.is_testbed(value):
                models[value] = self.inputs.outside(value, entry.config.needs_weights)[0]
        workspace = Workspace(self.scratch / entry.name, entry.name, derive(self.page.seed, entry.name))
        return entry.config.forecast(models, workspace)

    def _folder(self, entry: Entry) -> Path:
        return self.folder / "stages" / entry.name


def _models(entry: Entry) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reference.value for reference in entry.config.references()))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _makespan(stages: Sequence[StagePlan], jobs: int) -> float:
    """Seconds until all stages are done when each free worker takes the ready stage with the longest
    chain.
    """
    cost = {stage.stage: stage.seconds_left for stage in stages}
    chain = chains(stages)
    ended: dict[str, float] = {}
    workers = [0.0] * jobs
    waiting = {stage.stage: stage for stage in stages}
    while waiting:
        ready = [stage for stage in waiting.values() if all(name in ended for name in stage.needs)]
        free = min(workers)
        begin = {stage.stage: max([free, *(ended[name] for name in stage.needs)]) for stage in ready}
        chosen = min(ready, key=lambda stage: (begin[stage.stage], -chain[stage.stage]))
        del waiting[chosen.stage]
        ended[chosen.stage] = begin[chosen.stage] + cost[chosen.stage]
        if cost[chosen.stage]:
            workers[workers.index(free)] = ended[chosen.stage]
    return max(ended.values(), default=0.0)


def chains(stages: Sequence[StagePlan]) -> dict[str, float]:
    """For each stage the predicted seconds of the longest chain of stages that begins with it."""
    chain: dict[str, float] = {}
    for stage in reversed(stages):
        users = [chain[other.stage] for other in stages if stage.stage in other.needs]
        chain[stage.stage] = stage.seconds_left + max(users, default=0.0)
    return chain
