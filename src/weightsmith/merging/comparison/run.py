"""A comparison from its page to its folder.

    OUT/comparison.json        everything, for programs; rewritten after every method
    OUT/<method>/              the checkpoint
    OUT/.records/<method>.json one finished method: cost, measures, scores; .npy its sample
    OUT/.records/inputs.json   measures and scores of base and models

A method is done when its record is on disk and was made from the same page, inputs and tasks. A killed run is
started again by the same command and goes on with the methods that are not done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weightsmith.errors import CheckpointError, InputError, PageError, SystemFault
from weightsmith.evaluation import TaskConfig, check_tasks
from weightsmith.evaluation.tasks import Tasks
from weightsmith.merging.comparison import apart
from weightsmith.merging.comparison.judging import SAMPLED_ENTRIES, cosines, judge
from weightsmith.merging.comparison.scores import digest, gain, score_inputs, scored, tasks_digest
from weightsmith.merging.comparison.variants import (
    PageLike,
    Variant,
    Variants,
    is_spectral,
    read_variants,
    reason,
)
from weightsmith.merging.diagnostics import diagnose
from weightsmith.merging.plan import open_plan
from weightsmith.registry import card, cards
from weightsmith.runs.atomic import read_json, sync_folder, system_faults, write_json
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.testbed.domains import Split

COMPARISON_FILE = "comparison.json"
FORMAT = 1
_RECORDS = ".records"

Keep = Literal["all", "best", "none"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One method that can take the page.

    Attributes:
        variant: The page as it takes it.
        identity: Stands for method, options, inputs and versions.
        disk_bytes: Of its output.
    """

    variant: Variant
    identity: str
    disk_bytes: int

    @property
    def method(self) -> str:
        """The method's id."""
        return self.variant.method


@dataclass(frozen=True)
class Opened:
    """A page whose models were opened and fit each other.

    Attributes:
        variants: The page as methods take it.
        jobs: Methods that can merge these models.
        refused: Method -> why it can't.
        inputs: Name and place of the base (if any) and the models, the base first.
        base: Name of the base.
        warnings: What the user should know about the models.
        elements: Float weights of one model.
    """

    variants: Variants
    jobs: tuple[Job, ...]
    refused: Mapping[str, str]
    inputs: tuple[tuple[str, str], ...]
    base: str | None
    warnings: tuple[str, ...]
    elements: int


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        path: The folder.
        content: What `comparison.json` holds.
    """

    path: Path
    content: Mapping[str, Any] = field(repr=False)

    @property
    def failed(self) -> Mapping[str, str]:
        """Methods that began and could not end, and why."""
        return self.content["failed"]

    def check(self) -> None:
        """Raise where a method failed.

        Raises:
            InputError: names the first one.
        """
        if self.failed:
            (name, why), *rest = self.failed.items()
            more = f"; so did {', '.join(other for other, _ in rest)}" if rest else ""
            raise InputError(f"{name} failed: {why}{more}; the others are in {self.path}")


def compare(
    page: PageLike,
    out: str | Path,
    *,
    methods: Sequence[str] = ("all",),
    tasks: Tasks | None = None,
    keep: Keep = "all",
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = SILENT,
    say: Say | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Merge by several methods and compare what they make.

    Args:
        page: A merge page, see `variants`; or its content.
        out: Folder to make, or to go on with.
        methods: `all`, or names of methods.
        tasks: What base, models and results are scored on; see `evaluate`. Test-bed tasks use the test pool,
            or the calibration pool where the best result is chosen by it.
        keep: Which checkpoints stay: all, the one with the largest gain, or none.
        device: Where spectral methods compute and models are scored.
        threads: Workers at once; one a core by default.
        progress: Told what is done.
        say: Told in words what begins.
        overwrite: Replace methods that were merged from another page or other models.

    Raises:
        PageError: the page is wrong, or no method can take it.
        CheckpointError: a model can't be read, or `out` holds something else.
        InputError: a wrong task, or `keep: best` without any.
        SystemFault: the machine failed; what is done is kept, and the same call goes on.
    """
    out, wanted = Path(out), check_tasks(tasks) if tasks is not None else ()
    if keep == "best" and not wanted:
        raise InputError("keep: `best` needs tasks to choose by: --evaluate TASK")
    split: Split = "calibration" if keep == "best" else "test"
    opened = open_variants(page, out, methods, device)
    _check_folder(out)
    with FolderLock(out, name=f"{_RECORDS}/lock", on_wait=say):
        state = _State(out, opened, wanted, split, keep)
        if not overwrite:
            state.check_records()
        state.check_disk()
        state.write(finished=False)
        state.inputs = _inputs_record(state, device, threads, progress, say)
        for job in opened.jobs:
            if not state.is_done(job):
                if say is not None:
                    say(f"{job.method}: {card(job.method, 'merging').name}")
                _one(state, job, device, threads, progress)
                state.write(finished=False)
        if job := state.lost_best():
            _one(state, job, device, threads, progress)
        state.prune()
        return Comparison(out, state.write(finished=True))


def open_variants(page: PageLike, out: Path | None, methods: Sequence[str], device: str) -> Opened:
    """Read the page for every method and open its models.

    Raises:
        PageError: the page is wrong, or no method can take it.
        CheckpointError: a model can't be read or doesn't fit; a method named by the user can't merge these.
    """
    variants = read_variants(page, methods)
    with open_plan(variants.reference, device=device) as plan:
        base = plan.donor if variants.reference.base is not None else None
        places = [source.model for source in variants.reference.slices[0].inputs]
        inputs = list(zip(plan.models, places, strict=True))
        if base is not None:
            inputs.insert(0, (base.name, str(variants.reference.base)))
        below = base.fingerprint() if base is not None else ""
        warnings = plan.warnings
        elements = sum(o.spec.numel for o in plan.outputs if o.method is not None)
    jobs, refused = [], dict(variants.refused)
    problem: Exception | None = None
    for variant in variants.found:
        try:
            # Where one output goes is not where the comparison goes: the folder may hold earlier ones.
            with open_plan(variant.config, _place(out, variant), overwrite=True, device=device) as plan:
                identity = digest([plan.lineage.to_bytes().decode(), below])
                jobs.append(Job(variant, identity, plan.disk_bytes))
        except (PageError, CheckpointError) as wrong:
            if tuple(methods) != ("all",):
                raise
            problem = problem or wrong
            refused[variant.method] = reason(wrong)
    if not jobs:
        assert problem is not None
        raise problem
    refused = {entry.id: refused[entry.id] for entry in cards("merging") if entry.id in refused}
    return Opened(
        variants,
        tuple(jobs),
        refused,
        tuple(inputs),
        base.name if base is not None else None,
        warnings,
        elements,
    )


def _place(out: Path | None, variant: Variant) -> Path | None:
    return None if out is None else out / variant.method


class _State:
    """What is known of a comparison's folder."""

    def __init__(
        self, out: Path, opened: Opened, tasks: Sequence[TaskConfig], split: Split, keep: Keep
    ) -> None:
        self.out, self.opened, self.tasks, self.split, self.keep = out, opened, tasks, split, keep
        self.scoring = tasks_digest(tasks, split) if tasks else ""
        self.inputs: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.records = {job.method: self._read(job.method) for job in opened.jobs}

    def checkpoint(self, method: str) -> Path:
        """The folder of a method's output."""
        return self.out / method

    def record_file(self, name: str) -> Path:
        """Where a record is, or will be."""
        return self.out / _RECORDS / f"{name}.json"

    def sample_file(self, method: str) -> Path:
        """Where the sample of a method's output is."""
        return self.out / _RECORDS / f"{method}.npy"

    def known(self, job: Job) -> dict[str, Any] | None:
        """The record of this very merge."""
        record = self.records[job.method]
        return record if record and record["identity"] == job.identity else None

    def is_done(self, job: Job) -> bool:
        """Whether nothing is left to do for a method, its checkpoint included where it is to be kept."""
        record = self.known(job)
        if record is None or (self.tasks and record["scoring"] != self.scoring):
            return False
        return self.keep != "all" or self.checkpoint(job.method).is_dir()

    def lost_best(self) -> Job | None:
        """The best method, where an earlier run did not keep its checkpoint."""
        best = self.best() if self.keep == "best" else None
        if best is None or self.checkpoint(best).is_dir():
            return None
        return next(job for job in self.opened.jobs if job.method == best)

    def forget(self, job: Job) -> None:
        """Take back an older record before its checkpoint is replaced."""
        with system_faults(self.out):
            self.record_file(job.method).unlink(missing_ok=True)
        self.records[job.method] = None

    def check_records(self) -> None:
        """Refuse to replace what was merged from another page or other models."""
        for job in self.opened.jobs:
            folder = self.checkpoint(job.method)
            if self.known(job) is None and folder.exists() and self.records[job.method] is not None:
                raise CheckpointError(
                    f"{folder}: was merged from another page, other models or by another version; choose "
                    "another output, or pass --overwrite to merge it again"
                )

    def check_disk(self) -> None:
        """Refuse to begin what the disk has no room for."""
        needed = disk_bytes([job for job in self.opened.jobs if not self.is_done(job)], self.keep)
        place = self.out.absolute()
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise SystemFault(
                f"{self.out}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; fewer "
                "methods, or --keep best or none, need less"
            )

    def finish(self, job: Job, record: dict[str, Any], sample: np.ndarray) -> None:
        """Make a finished method durable, then delete what is not to be kept."""
        file = self.sample_file(job.method)
        with system_faults(file):
            partial = file.with_suffix(".part")
            with open(partial, "wb") as target:
                np.save(target, sample)
                target.flush()
                os.fsync(target.fileno())
            os.replace(partial, file)
            sync_folder(file.parent)
        write_json(self.record_file(job.method), record)
        self.records[job.method] = record
        self.failed.pop(job.method, None)
        self.prune()

    def prune(self) -> None:
        """Delete checkpoints that are not to be kept; after a kill, those that should have been deleted."""
        if self.keep == "all":
            return
        best = self.best() if self.keep == "best" else None
        for job in self.opened.jobs:
            if job.method != best and self.known(job) is not None and self.checkpoint(job.method).is_dir():
                with system_faults(self.out):
                    shutil.rmtree(self.checkpoint(job.method))

    def scores(self) -> dict[str, Mapping[str, Any]]:
        """Scores by method, of those that have them."""
        found = {job.method: self.known(job) for job in self.opened.jobs}
        return {name: one["scores"] for name, one in found.items() if one and self.tasks and one["scores"]}

    def reference(self) -> Mapping[str, Any] | None:
        """What gains are over: the base, else the first model that has scores, else the first result."""
        return next(iter((*self.inputs.get("scores", {}).values(), *self.scores().values())), None)

    def best(self) -> str | None:
        """The method with the largest gain; the first of equal ones."""
        reference = self.reference()
        gains = {name: gain(one, reference) for name, one in self.scores().items()} if reference else {}
        return max(gains, key=lambda name: gains[name], default=None)

    def write(self, *, finished: bool) -> dict[str, Any]:
        """Write `comparison.json` as far as things are known."""
        opened = self.opened
        done = [(job, record) for job in opened.jobs if (record := self.known(job))]
        reference = self.reference()
        content = {
            "format": FORMAT,
            "finished": finished,
            "name": opened.variants.name,
            "page": opened.variants.page,
            "keep": self.keep,
            "base": opened.base,
            "models": [name for name, _ in opened.inputs if name != opened.base],
            "warnings": list(dict.fromkeys((*opened.warnings, *self.inputs.get("notes", ())))),
            "inputs": self.inputs.get("diagnostics"),
            "tasks": [task.label for task in self.tasks],
            "split": self.split if any(task.is_bed for task in self.tasks) else "",
            "scores": self.inputs.get("scores", {}),
            "methods": [self._told(job, record, reference) for job, record in done],
            "best": self.best() if self.tasks else None,
            "cosine": cosines([np.load(self.sample_file(job.method), "r") for job, _ in done]),
            "elements": opened.elements,
            "sampled": min(opened.elements, SAMPLED_ENTRIES),
            "waiting": [
                job.method for job in opened.jobs if self.known(job) is None and job.method not in self.failed
            ],
            "refused": dict(opened.refused),
            "failed": self.failed,
        }
        write_json(self.out / COMPARISON_FILE, content)
        return content

    def _told(
        self, job: Job, record: Mapping[str, Any], reference: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        known = card(job.method, "merging")
        scores = record["scores"] if self.tasks else None
        return {
            "method": job.method,
            "name": known.name,
            "paper": known.paper,
            "spectral": is_spectral(job.method),
            "options": {
                key: value
                for key, value in job.variant.body.items()
                if key not in ("method", "merge_method", "base", "base_model", "models")
            },
            "kept": self.checkpoint(job.method).is_dir(),
            **{key: record[key] for key in ("seconds", "memory_bytes", "bytes", "warnings", "measures")},
            "scores": scores or {},
            "gain": gain(scores, reference) if scores and reference else None,
        }

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.record_file(name)
        if not file.is_file() or (name != "inputs" and not self.sample_file(name).is_file()):
            return None
        return read_json(file)


def disk_bytes(jobs: Sequence[Job], keep: Keep) -> int:
    """Disk that merging needs at its fullest."""
    sizes = sorted((job.disk_bytes for job in jobs), reverse=True)
    return sum(sizes if keep == "all" else sizes[: 2 if keep == "best" else 1])


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds something else."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file, expected a folder to make")
    if any(out.iterdir()) and not (out / COMPARISON_FILE).is_file() and not (out / _RECORDS).is_dir():
        raise CheckpointError(
            f"{out}: holds files but no comparison (no {COMPARISON_FILE}); choose another output"
        )


def _inputs_record(
    state: _State, device: str, threads: int | None, progress: Progress, say: Say | None
) -> dict[str, Any]:
    """Measures and scores of base and models, once for these models and tasks."""
    opened = state.opened
    with open_plan(opened.variants.reference) as plan:
        identity = digest([plan.lineage.to_bytes().decode(), opened.base])
        file = state.record_file("inputs")
        known = read_json(file) if file.is_file() else None
        if known and known["identity"] == identity and known["scoring"] == state.scoring:
            return known
        if say is not None:
            say("base and models")
        measured = diagnose(plan, threads=threads, progress=progress)
    record = {
        "identity": identity,
        "scoring": state.scoring,
        "diagnostics": measured,
        "scores": {},
        "notes": [],
    }
    if state.tasks:
        record["scores"], record["notes"] = score_inputs(
            opened.inputs, state.tasks, state.split, device, progress
        )
    write_json(file, record)
    return record


def _one(state: _State, job: Job, device: str, threads: int | None, progress: Progress) -> None:
    """Merge by one method, measure and score what came out, and keep a record of it."""
    out = state.checkpoint(job.method)
    record = state.known(job)
    try:
        # A record without these scores is worth something as long as its checkpoint is there.
        if record is None or not out.is_dir():
            state.forget(job)
            made = apart.merge_apart(
                job.variant.body,
                out,
                device=device if is_spectral(job.method) else "auto",
                threads=threads,
                progress=progress,
            )
            measures, sample = judge(state.opened.variants.reference, out, threads=threads, progress=progress)
            record = {
                "identity": job.identity,
                "seconds": made["seconds"],
                "memory_bytes": made["memory_bytes"],
                "bytes": made["bytes"],
                "warnings": made["warnings"],
                "measures": measures,
            }
        else:
            sample = np.load(state.sample_file(job.method))
        scores = scored(out, state.tasks, state.split, device, progress) if state.tasks else {}
    except (InputError, apart.EndedEarlyError) as problem:
        state.failed[job.method] = reason(problem)
        return
    state.finish(job, {**record, "scoring": state.scoring, "scores": scores}, sample)


__all__ = ["Comparison", "compare", "open_variants"]
