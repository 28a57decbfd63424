"""A merge spread over the machines of a Ray cluster that share a file system.

Order    This process opens the plan, lays out the output and surveys what counts over all tensors. Tensors
         then go out in parts, largest first, to whichever machine has a core free; a machine opens the same
         models, merges its part by the same engine, writes into the files of the output at their final
         places, and answers with checksums. This process commits. Bits do not depend on who did what, as
         long as the processors are of one kind (matrices are factorised by their own routines).
Needs    Working folder, models and output under the same paths everywhere, the same versions of weightsmith
         and numpy. A part whose machine was lost is done again: the same bytes to the same places.
Memory   A core holds what a worker of one machine holds. A task of whole matrices books its memory with Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import CheckpointWriter
from weightsmith.checkpoints.writer import JoinedFiles, Joint, Receipt
from weightsmith.errors import InputError, SystemFault, WeightsmithError, require
from weightsmith.merging.config import MergeConfig
from weightsmith.merging.engine import execute, survey_of, whole_bytes
from weightsmith.merging.plan import MergePlan, open_plan
from weightsmith.runs.environment import versions
from weightsmith.runs.progress import SILENT, Progress

# Parts for each core: enough that a slow machine holds nobody up, few enough that opening models is nothing.
_PARTS_A_CORE = 4
# How long parts that are of no use any more are waited for.
_END_SECONDS = 10.0
_CHECKED = ("weightsmith", "numpy")


@dataclasses.dataclass(frozen=True)
class _Task:
    """What every part of one merge has in common; travels to the machines."""

    config: MergeConfig
    joint: Joint
    stats: Mapping[str, Any]
    folder: Path
    versions: Mapping[str, str]


def execute_on_machines(
    plan: MergePlan, writer: CheckpointWriter, address: str, *, progress: Progress
) -> tuple[dict[str, dict[str, Any]], int]:
    """Merge all outputs of a plan on a cluster.

    Args:
        plan: The opened merge.
        writer: Of its output, on a disk that all machines see.
        address: "auto" for the cluster this machine is in, "local" for one on this machine alone, or
            HOST:PORT.
        progress: Told the bytes written.

    Returns:
        What spectral methods report of each tensor, and the number of machines that took part.

    Raises:
        InputError: no such cluster, or a machine has other versions.
        CheckpointError: NaN or infinity in a weight.
        MissingExtraError: ray is not installed.
        SystemFault: reading or writing failed, or a machine can't see the output.
    """
    ray = require("ray", extra="ray", needed_by="merging on several machines")
    require("ray.util.scheduling_strategies", extra="ray", needed_by="merging on several machines")
    # Before Ray: surveys fork, and a process that talks to a cluster must not.
    stats = survey_of(plan, plan.outputs, progress)
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        config = dataclasses.replace(plan.config, page=None)
        task = _Task(config, writer.joint(), stats, Path.cwd(), versions(_CHECKED))
        return _spread(ray, plan, writer, task, progress)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as problem:
        first = str(problem).strip().partition("\n")[0]
        raise InputError(
            f"ray: no cluster at `{address}` ({first}); expected auto, local or HOST:PORT of one that runs"
        ) from problem


def _spread(
    ray: Any, plan: MergePlan, writer: CheckpointWriter, task: _Task, progress: Progress
) -> tuple[dict[str, dict[str, Any]], int]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes}
    memory = int(max((node["Resources"].get("memory", 0) for node in nodes), default=0))
    gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes) and plan.device != "cpu"
    if not any(cores.values()):
        raise InputError("ray: the cluster has no core to work on")
    # A place for each core, machine by machine in turn, so that few parts still reach them all.
    places = [node for turn in range(max(cores.values())) for node in cores if turn < cores[node]]
    sizes = {output.spec.name: output.spec.nbytes for output in plan.outputs}
    common = ray.put(task)
    remote = ray.remote(_merge_part)
    to_do = iter(_parts(plan, len(places)))
    running: dict[Any, tuple[list[str], str]] = {}
    info: dict[str, dict[str, Any]] = {}
    machines: set[str] = set()

    def begin(place: str) -> None:
        """Give the next part, if there is one, to a machine; to another one where that is lost."""
        for names, needs in itertools.islice(to_do, 1):
            on_gpu = gpus and needs > 0
            affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place, soft=True)
            how = remote.options(
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                memory=min(needs, memory) or None,
                scheduling_strategy=affinity,
            )
            running[how.remote(common, names, "cuda" if on_gpu else "cpu")] = names, place

    progress.start("merge", float(sum(sizes.values())), "B")
    try:
        for place in places:
            begin(place)
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            receipts, told, machine = _answer(ray, done)
            for name, receipt in receipts.items():
                writer.receive(name, receipt)
            info |= told
            machines.add(machine)
            names, place = running.pop(done)
            progress.advance(float(sum(sizes[name] for name in names)))
            begin(place)
    finally:
        # What still runs after an error is a few parts; a file that one of them holds open can't go away on
        # every file system. (Cancelling a part at the moment it ends stops Ray 2.60 itself.)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_END_SECONDS)
    progress.done()
    return info, len(machines)


def _answer(ray: Any, done: Any) -> tuple[dict[str, Receipt], dict[str, dict[str, Any]], str]:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as failure:
        cause = failure.cause
        raise cause if isinstance(cause, WeightsmithError) else failure from None
    except ray.exceptions.RayError as failure:
        first = str(failure).strip().partition("\n")[0]
        raise SystemFault(f"ray: a part of the merge was lost: {first}. No output was written.") from failure


def _parts(plan: MergePlan, cores: int) -> Iterator[tuple[list[str], int]]:
    """Names of the tensors of each part, and the memory that its matrices take; largest first."""
    whole: dict[str, int] = {}
    for parameter, method in plan.parameters():
        if getattr(method, "spectral", False) and method.takes(parameter):
            whole[parameter.name] = whole_bytes(parameter, method)
    for name in sorted(whole, key=lambda name: -whole[name]):
        yield [name], whole[name]
    tiled = sorted(
        (output for output in plan.outputs if output.spec.name not in whole),
        key=lambda output: -output.spec.nbytes,
    )
    room = sum(output.spec.nbytes for output in tiled) / (cores * _PARTS_A_CORE)
    part: list[str] = []
    size = 0
    for output in tiled:
        part.append(output.spec.name)
        size += output.spec.nbytes
        if size >= room:
            yield part, 0
            part, size = [], 0
    if part:
        yield part, 0


def _merge_part(task: _Task, names: Sequence[str], device: str) -> tuple[Any, Any, str]:
    """Runs on a machine: one part of the merge. Receipts, reports, the machine's name for itself."""
    machine = socket.gethostname()
    found = versions(_CHECKED)
    for package, version in task.versions.items():
        if found.get(package) != version:
            raise InputError(
                f"{machine}: has {package} {found.get(package)}, the machine that began has {version}; "
                "expected the same everywhere"
            )
    for place in (task.folder, task.joint.part):
        if not place.is_dir():
            raise SystemFault(
                f"{machine}: can't see {place}; working folder, models and output must be on a file system "
                "that all machines share"
            )
    os.chdir(task.folder)  # where the page's paths begin
    plan = _opened(task, device)
    wanted = set(names)
    outputs = [output for output in plan.outputs if output.spec.name in wanted]
    with JoinedFiles(task.joint) as files:
        told = execute(plan, outputs, files, progress=SILENT, stats=task.stats)
        receipts = {name: files.receipt(name) for name in names}
    return receipts, told, _node()


_PLAN: list[tuple[Path, MergePlan]] = []
"""The plan that this process has open, with the folder that its output is made in."""


def _opened(task: _Task, device: str) -> MergePlan:
    """The plan, opened once in each process: its cores are Ray's to give, so it has one worker."""
    if not _PLAN or _PLAN[0][0] != task.joint.part or _PLAN[0][1].device != device:
        while _PLAN:
            _PLAN.pop()[1].close()
        _PLAN.append((task.joint.part, open_plan(task.config, threads=1, device=device)))
    return _PLAN[0][1]


def _node() -> str:
    """What the cluster calls the machine that this process is on."""
    ray = require("ray", extra="ray", needed_by="merging on several machines")
    return ray.get_runtime_context().get_node_id()
