"""Run a recipe: what is not done yet, side by side where stages don't depend on each other.

    runs/<name>/recipe.yaml        the page as run
    runs/<name>/environment.json   Python, packages, cores
    runs/<name>/ledger.jsonl       one line per event, with times
    runs/<name>/stages/<stage>/    the outputs, and stage.json once the stage is done

A stage that fails takes down what depends on it and nothing else. Whatever stops a run, the next one goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from weightsmith.errors import WeightsmithError, require
from weightsmith.recipes.executors import Executor, Outcome, Processes
from weightsmith.recipes.inputs import Inputs
from weightsmith.recipes.page import Page, load_page
from weightsmith.recipes.plan import RunPlan, chains, plan_run
from weightsmith.recipes.record import Record, read_record, tidy
from weightsmith.recipes.stages.contract import Entry
from weightsmith.runs.atomic import append_line, write_json, write_text
from weightsmith.runs.environment import cores, environment
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.progress import SILENT, Progress

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """How one stage came out of a run.

    Attributes:
        stage: Its name.
        status: `finished` in this run, `reused` from an earlier one, `failed`, or `skipped` because one it
            needs failed.
        seconds: Wall time of the work, whenever it was done.
        peak_bytes: Peak resident memory of its process.
        message: One line when it failed or was skipped.
    """

    stage: str
    status: Literal["finished", "reused", "failed", "skipped"]
    seconds: float = 0.0
    peak_bytes: int = 0
    message: str = ""
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did.

    Attributes:
        folder: The run's folder.
        stages: One result per stage, in the page's order.
        seconds: Wall time of this run.
    """

    folder: Path
    stages: tuple[StageResult, ...]
    seconds: float


class RunFailed(WeightsmithError):
    """At least one stage failed; `result` tells of all, the message has one line per failure."""

    def __init__(self, result: RunResult) -> None:
        failed = [stage for stage in result.stages if stage.status == "failed"]
        skipped = [stage.stage for stage in result.stages if stage.status == "skipped"]
        lines = [f"stage `{stage.stage}` failed: {stage.message}" for stage in failed]
        if skipped:
            lines[-1] += f"; not started: {', '.join(skipped)}"
        super().__init__("\n".join(lines))
        self.result = result
        self.exit_code = failed[0].exit_code


def run_recipe(
    page: Page | str | Path,
    *,
    root: str | Path = "runs",
    jobs: int | None = None,
    plan: RunPlan | None = None,
    executor: Executor | None = None,
    progress: Callable[[str], Progress] = lambda stage: SILENT,
    say: Say = log.info,
) -> RunResult:
    """Run the stages of a recipe that are not done yet.

    Args:
        page: The recipe, or its file.
        root: Folder of all runs; this one goes to `root/<name>`.
        jobs: Stages to run at once; two, or one on a single core.
        plan: What `plan_run` said of the page, where it was asked already.
        executor: Where stages run; processes of their own by default.
        progress: Makes the receiver of one stage's progress from the stage's name. Calls come from this
            thread.
        say: Gets one line per event worth telling a user.

    Raises:
        PageError: the page is wrong, or its models don't fit each other; nothing was started.
        CheckpointError: a model from outside the recipe can't be read; nothing was started.
        RunFailed: a stage failed; all that don't depend on it have been run.
        SystemFault: the run's folder can't be written, or will not hold what the plan says.
        MissingExtraError: a stage needs a package that is not installed; nothing was started.
    """
    page = page if isinstance(page, Page) else load_page(page)
    folder = Path(root) / page.name
    executor = executor or Processes(jobs or min(2, cores()))
    plan = plan or plan_run(page, root=root, jobs=executor.jobs)
    plan.check_disk()
    _check_extras(page, plan)
    started = time.perf_counter()
    with FolderLock(folder, on_wait=say):
        write_text(folder / "recipe.yaml", page.text)
        write_json(folder / "environment.json", environment())
        run = _Run(page, folder, plan, executor, progress, say)
        try:
            run.work()
        finally:
            executor.close()
        result = RunResult(
            folder=folder,
            stages=tuple(run.results[name] for name in page.stages),
            seconds=round(time.perf_counter() - started, 3),
        )
    if any(stage.status == "failed" for stage in result.stages):
        raise RunFailed(result)
    return result


def _check_extras(page: Page, plan: RunPlan) -> None:
    for stage in plan.stages:
        needed = stage.status != "reuse" and page.stages[stage.stage].config.needs_transformers
        # Looked for first: importing it here would take seconds.
        if needed and importlib.util.find_spec("transformers") is None:
            require("transformers", extra="hf", needed_by=f"stage `{stage.stage}`")


class _Run:
    """The state of one run: which stages wait, which run, how the others came out."""

    def __init__(
        self,
        page: Page,
        folder: Path,
        plan: RunPlan,
        executor: Executor,
        progress: Callable[[str], Progress],
        say: Say,
    ) -> None:
        self.page, self.folder, self.executor = page, folder, executor
        self.progress, self.say = progress, say
        self.inputs = Inputs(page, folder)
        self.ledger = folder / "ledger.jsonl"
        self.waiting = dict(page.stages)
        self.running: dict[str, Any] = {}
        self.records: dict[str, Record] = {}
        self.results: dict[str, StageResult] = {}
        self.plans = {stage.stage: stage for stage in plan.stages}
        self.chains = chains(plan.stages)

    def work(self) -> None:
        while self.waiting or self.running:
            while (entry := self._next()) is not None:
                self._begin(entry)
            if self.running:
                for outcome in self.executor.outcomes():
                    self._end(outcome)

    def _next(self) -> Entry | None:
        """The stage to begin now: of those that can, the one with the longest chain of work behind it."""
        if len(self.running) >= self.executor.jobs:
            return None
        ready = [
            entry
            for entry in self.waiting.values()
            if all(name in self.results and name not in self.running for name in entry.stages)
        ]
        return max(ready, key=lambda entry: self.chains[entry.name], default=None)

    def _begin(self, entry: Entry) -> None:
        del self.waiting[entry.name]
        missing = [name for name in entry.stages if name not in self.records]
        if missing:
            text = f"`{missing[0]}` failed or was not started"
            self._record("skipped", entry, message=text, exit_code=1)
            return
        try:
            job = replace(
                self.inputs.job(entry, self.records), predicted=asdict(self.plans[entry.name].prediction)
            )
        except WeightsmithError as error:  # its data vanished since the page was checked
            self._record("failed", entry, message=str(error), exit_code=error.exit_code)
            return
        if record := self.inputs.finished(job):
            with FolderLock(self.folder, name=f".locks/{entry.name}", on_wait=self.say):
                tidy(job.folder, record)
            self.records[entry.name] = record
            self._record("reused", entry, record)
            return
        before = read_record(job.folder)
        if before and before.fingerprint == job.fingerprint:
            self.say(f"{entry.name}: its outputs are damaged or incomplete ({job.folder}); made again")
            self._log("damaged", entry.name, entry.kind, job.fingerprint)
        self._log("started", entry.name, entry.kind, job.fingerprint)
        self.running[entry.name] = entry
        self.executor.start(job, self.progress(entry.name), self.say)

    def _end(self, outcome: Outcome) -> None:
        entry = self.running.pop(outcome.stage)
        if outcome.record is None:
            self._record("failed", entry, message=outcome.message, exit_code=outcome.exit_code)
            return
        self.records[entry.name] = outcome.record
        self._record("finished", entry, outcome.record)

    def _record(
        self,
        status: Literal["finished", "reused", "failed", "skipped"],
        entry: Entry,
        record: Record | None = None,
        *,
        message: str = "",
        exit_code: int = 0,
    ) -> None:
        result = StageResult(
            stage=entry.name,
            status=status,
            seconds=record.seconds if record else 0.0,
            peak_bytes=record.peak_bytes if record else 0,
            message=message,
            exit_code=exit_code,
        )
        self.results[entry.name] = result
        self._log(
            status,
            entry.name,
            entry.kind,
            record.fingerprint if record else None,
            seconds=result.seconds,
            peak_bytes=result.peak_bytes,
            **({"message": message} if message else {}),
        )
        cost = f" ({record.seconds:.1f} s, {record.peak_bytes / 1e6:.0f} MB)" if record else ""
        self.say(f"{entry.name}: {status}{cost}" + (f": {message}" if message else ""))

    def _log(self, event: str, stage: str, kind: str, fingerprint: str | None, **more: Any) -> None:
        line = {"event": event, "stage": stage, "kind": kind, "fingerprint": fingerprint, **more}
        append_line(self.ledger, {**line, "time": round(time.time(), 3)})
