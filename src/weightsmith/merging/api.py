"""The functions people call: merge folders, or tensors and state dicts that are in memory already."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import CheckpointWriter
from weightsmith.checkpoints.folder import LINEAGE_FILE
from weightsmith.checkpoints.staging import Staging
from weightsmith.errors import InputError
from weightsmith.merging.config import MergeConfig, parse_merge, read_merge_page
from weightsmith.merging.engine import execute
from weightsmith.merging.plan import MergePlan, open_plan
from weightsmith.registry import load
from weightsmith.runs.atomic import write_bytes
from weightsmith.runs.memory import peak_rss_bytes
from weightsmith.runs.progress import SILENT, Progress

Config = MergeConfig | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        path: The finished folder.
        method: The method's id.
        parameters: Number of elements written.
        bytes: Size of the folder.
        seconds: Wall time, opening the inputs included.
        memory_bytes: Peak memory of this process and its workers together, since this process began.
        warnings: What the user should know.
        vocabulary: What became of the models' tokens; None where every model was used as it is.
        tensors: What spectral methods report of each tensor: ranks, weights.
        machines: How many machines took part; `memory_bytes` is then that of the first alone.
    """

    path: Path
    method: str
    parameters: int
    bytes: int
    seconds: float
    memory_bytes: int
    warnings: tuple[str, ...] = ()
    vocabulary: Mapping[str, Any] | None = None
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machines: int = 1

    def summary(self) -> dict[str, Any]:
        """The report without the tensors, for people and programs."""
        return {
            "path": str(self.path),
            "method": self.method,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "memory_bytes": self.memory_bytes,
            "machines": self.machines,
            "vocabulary": self.vocabulary,
            "warnings": list(self.warnings),
        }


def merge(
    config: Config,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
    ray: str | None = None,
) -> MergeReport:
    """Merge checkpoints into the folder `out`.

    Args:
        config: A page's path, its content as a mapping, or what `read_merge_page` made of it.
        out: Folder to make; it appears whole or not at all. A method that makes a model for each task (EMR)
            and is given no `task` makes a checkpoint for each inside, called by the models' names.
        device: Where spectral methods compute: "auto", "cpu", "cuda". Element-wise methods use the CPU.
        threads: Workers at once; one a core by default. The output's bytes do not depend on it.
        progress: Told what is done.
        overwrite: Replace `out` when it exists and is a checkpoint.
        ray: Spread the work over a Ray cluster whose machines share a file system: "auto", "local" or
            HOST:PORT. The output's bytes are the same.

    Raises:
        PageError: the page is wrong.
        InputError: `ray` names no cluster.
        MissingExtraError: `ray` is given and not installed.
        CheckpointError: a model can't be read, the models don't fit each other, `out` exists, or a weight is
            NaN or infinite.
        SystemFault: the machine failed; nothing is left behind.
    """
    begun = time.perf_counter()
    config = _parsed(config)
    if _lacks_task(config):
        return _merge_each_task(
            config, Path(out), device=device, threads=threads, progress=progress, overwrite=overwrite, ray=ray
        )
    with plan_merge(config, out, overwrite=overwrite, threads=threads, device=device) as plan:
        written, tensors, machines = run_plan(plan, Path(out), progress, ray=ray)
        return MergeReport(
            path=Path(out),
            method=plan.config.method,
            parameters=sum(output.spec.numel for output in plan.outputs),
            bytes=written,
            seconds=time.perf_counter() - begun,
            memory_bytes=peak_rss_bytes(),
            warnings=plan.warnings,
            vocabulary=plan.vocabulary,
            tensors=tensors,
            machines=machines,
        )


def _merge_each_task(
    config: MergeConfig,
    out: Path,
    *,
    device: str,
    threads: int | None,
    progress: Progress,
    overwrite: bool,
    ray: str | None,
) -> MergeReport:
    """A checkpoint for the task of each model, all inside `out`, which appears when all are done."""
    begun = time.perf_counter()
    with open_plan(config, out, overwrite=overwrite, threads=threads, device=device) as plan:
        names = [name.replace("/", "--") for name in plan.models]
        lineage, warnings, vocabulary = plan.lineage.to_bytes(), plan.warnings, plan.vocabulary
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name}: name the `task`, one page for each")
    staging = Staging(out, overwrite=overwrite)
    try:
        reports = [
            merge(
                _of_task(config, place),
                staging.part / name,
                device=device,
                threads=threads,
                progress=progress,
                ray=ray,
            )
            for place, name in enumerate(names, start=1)
        ]
        write_bytes(staging.part / LINEAGE_FILE, lineage)
        staging.commit()
    finally:
        staging.abort()
    return MergeReport(
        path=out,
        method=config.method,
        parameters=sum(report.parameters for report in reports),
        bytes=sum(report.bytes for report in reports) + len(lineage),
        seconds=time.perf_counter() - begun,
        memory_bytes=peak_rss_bytes(),
        warnings=warnings,
        vocabulary=vocabulary,
        machines=max(report.machines for report in reports),
    )


def run_plan(
    plan: MergePlan, out: Path, progress: Progress, *, ray: str | None = None
) -> tuple[int, dict[str, dict[str, Any]], int]:
    """Write the plan's output; returns its bytes, what spectral methods report, how many machines did it."""
    with CheckpointWriter(
        out, plan.specs, side_files=plan.side_files, lineage=plan.lineage, overwrite=plan.overwrite
    ) as writer:
        if ray is None:
            tensors, machines = execute(plan, plan.outputs, writer, progress=progress), 1
        else:
            from weightsmith.merging.machines import execute_on_machines

            tensors, machines = execute_on_machines(plan, writer, ray, progress=progress)
        writer.commit()
        return writer.planned_bytes, tensors, machines


def plan_merge(
    config: Config,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
) -> MergePlan:
    """Open and check a merge without doing it: a context manager with `predict`, `summary` and `warnings`.

    Raises:
        PageError: the page is wrong.
        CheckpointError: a model can't be read, or the models don't fit each other.
    """
    config = _parsed(config)
    if _lacks_task(config):
        count = len(config.slices[0].inputs) - sum(
            source.model == config.base for source in config.slices[0].inputs
        )
        note = f"makes {count} folders, one for each task; what follows is for one"
        config = dataclasses.replace(_of_task(config, 1), warnings=(*config.warnings, note))
    return open_plan(config, out, overwrite=overwrite, threads=threads, device=device)


def _parsed(config: Config) -> MergeConfig:
    if isinstance(config, MergeConfig):
        return config
    return read_merge_page(config) if isinstance(config, str | Path) else parse_merge(config)


def _lacks_task(config: MergeConfig) -> bool:
    """Whether the method makes a model for one task and the page names none."""
    method = load(config.method, "merging")
    return getattr(method, "per_task", False) and config.options.get("task") is None


def _of_task(config: MergeConfig, task: int) -> MergeConfig:
    return dataclasses.replace(config, options={**config.options, "task": task})


def average(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> MergeReport:
    """The mean of checkpoints, uniform unless `weights` are given: `merge` with `linear`.

    Raises:
        The same as `merge`.
    """
    config: dict[str, Any] = {"method": "linear", "models": [str(model) for model in models]}
    if weights is not None:
        config["weight"] = list(weights)
    if dtype is not None:
        config["dtype"] = dtype
    return merge(config, out, threads=threads, progress=progress, overwrite=overwrite)
