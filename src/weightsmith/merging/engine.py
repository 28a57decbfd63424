"""Runs a plan: parameters in worker processes, each in tiles; matrices of spectral methods whole, on threads.

Order    The largest parameter first, so that no worker is left alone with it at the end. Results do not
         depend on the order: every tensor has its place in the output before the first is written.
Workers  One a core; why processes, and how they end, is told in `workers.py`. Spectral methods compute on
         one thread each, on as many at once as memory allows; on a GPU one matrix at a time, while another
         worker reads.
Memory   A worker holds one tile of every model and a few buffers of its size, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from weightsmith.errors import InputError
from weightsmith.merging.parameter import TILE_ELEMENTS, Parameter
from weightsmith.merging.plan import MergePlan, Output
from weightsmith.merging.workers import Processes, Tell, Threads
from weightsmith.runs.environment import cores
from weightsmith.runs.memory import free_bytes
from weightsmith.runs.progress import Progress

T = TypeVar("T")

# Share of the free memory that whole matrices may take.
_MEMORY_SHARE = 0.5
_COPIED_BYTES = 1 << 22


class Sink(Protocol):
    """Where merged tensors go: a `CheckpointWriter`, or arrays in memory."""

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Take elements of tensor `name` from `start` on, fp32."""

    def write_raw(self, name: str, data: np.ndarray, start: int = 0) -> None:
        """Take stored bytes of tensor `name` from element `start` on."""

    def receipt(self, name: str) -> Any:
        """What is known of tensor `name` after it was written."""

    def receive(self, name: str, receipt: Any) -> None:
        """Take note of a tensor that a forked copy of this sink wrote."""


def execute(
    plan: MergePlan,
    outputs: Sequence[Output],
    sink: Sink,
    *,
    progress: Progress,
    tile_elements: int = TILE_ELEMENTS,
    stats: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Merge `outputs` into `sink`.

    Args:
        plan: Where options that hold for all tensors are.
        outputs: Some or all of the plan's.
        sink: Takes the results, from several threads.
        progress: Told the bytes written.
        tile_elements: Elements of a tile; results do not depend on it.
        stats: What `survey_of` found, where `outputs` are a part of what a statistic counts over.

    Returns:
        What spectral methods report of each tensor, by name.

    Raises:
        CheckpointError: NaN or infinity in a weight.
        SystemFault: reading or writing failed.
    """
    copies = [output for output in outputs if output.method is None]
    pairs = _pairs(plan, outputs, tile_elements)
    dtypes = {output.spec.name: output.spec.dtype for output in outputs}
    itemsizes = {o.spec.name: o.spec.nbytes / max(o.spec.numel, 1) for o in outputs}
    count = max(1, plan.threads or cores())
    workers = Processes(count, tile_elements)
    known_stats = _survey(pairs, workers, progress) if stats is None else stats
    progress.start("merge", sum(output.spec.nbytes for output in outputs), "B")

    def by_tiles(pair: tuple[Parameter, Any], tell: Tell) -> tuple[str, Any]:
        parameter, method = pair
        if dtypes[parameter.name] == "BF16" and hasattr(method, "plain_sum"):
            _write_sums(parameter, method, sink, tell)
            return parameter.name, sink.receipt(parameter.name)
        known = _known(known_stats, parameter, method)
        for tile in parameter.tiles():
            sink.write(parameter.name, method.merge_tile(tile, known), tile.start)
            tell(tile.numel * itemsizes[parameter.name])
        return parameter.name, sink.receipt(parameter.name)

    whole = [(p, m) for p, m in pairs if getattr(m, "spectral", False) and m.takes(p)]
    taken = {parameter.name for parameter, _ in whole}
    tiled = [(p, m) for p, m in pairs if p.name not in taken]
    for name, receipt in workers.each(by_tiles, tiled, lambda pair: pair[0], progress.advance):
        sink.receive(name, receipt)
    # After the forks: those would inherit torch and what it holds.
    info = _by_matrices(whole, known_stats, sink, plan.device, count, itemsizes, progress)
    for output in copies:
        _copy(output, sink)
        progress.advance(output.spec.nbytes)
    progress.done()
    return info


def _write_sums(parameter: Parameter, method: Any, sink: Sink, tell: Tell) -> None:
    """A plain sum whose output is bfloat16: of the stored bits, where the models are bfloat16 too."""
    weights, divisor = method.plain_sum()
    # Of stored bits twice as many elements fit the same cache.
    for start, stop in parameter.spans(tiles=2):
        bits = parameter.sum_of_bits(start, stop, weights, divisor)
        if bits is None:
            sink.write(parameter.name, method.merge_tile(parameter.tile(start, stop), None), start)
        else:
            sink.write_raw(parameter.name, bits.view(np.uint8), start)
        tell(2 * (stop - start))


def survey_of(plan: MergePlan, outputs: Sequence[Output], progress: Progress) -> dict[str, Any]:
    """The statistics of `outputs` where they span tensors, by tensor; empty for methods without such."""
    workers = Processes(max(1, plan.threads or cores()), TILE_ELEMENTS)
    return _survey(_pairs(plan, outputs, TILE_ELEMENTS), workers, progress)


def _pairs(plan: MergePlan, outputs: Sequence[Output], tile_elements: int) -> list[tuple[Parameter, Any]]:
    return [
        (output.parameter(plan.donor.config, plan.config.nan_policy, tile_elements), output.method)
        for output in outputs
        if output.method is not None
    ]


def _known(stats: Mapping[str, Any], parameter: Parameter, method: Any) -> Any:
    """The statistic of one parameter: found over all of them, or in a first pass over this one."""
    return stats[parameter.name] if parameter.name in stats else method.survey(parameter)


def _survey(pairs: Sequence[tuple[Parameter, Any]], workers: Processes, progress: Progress) -> dict[str, Any]:
    """Stats of methods whose statistic spans tensors, by tensor; empty for the others."""
    methods = {method for _, method in pairs if getattr(method, "global_survey", False)}
    if not methods:
        return {}
    if len(methods) > 1 or any(method not in methods for _, method in pairs):
        raise InputError(
            "options that count over all tensors at once (`trim_scope: global`, `zero_sign: majority`, "
            "`granularity: layer`) need the same options for every tensor; found values by filter or depth"
        )
    method = methods.pop()

    def parallel(work: Callable[[Parameter], T], some: Sequence[Parameter]) -> list[T]:
        progress.start("measure", float(len(some)), "tensors")

        def one(parameter: Parameter, tell: Tell) -> T:
            found = work(parameter)
            tell(1.0)
            return found

        found = workers.each(one, some, lambda parameter: parameter, progress.advance)
        progress.done()
        return found

    return dict(method.survey_all([parameter for parameter, _ in pairs], parallel))


def _by_matrices(
    whole: Sequence[tuple[Parameter, Any]],
    stats: Mapping[str, Any],
    sink: Sink,
    device: str,
    count: int,
    itemsizes: Mapping[str, float],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """The whole-matrix route; torch is imported here and nowhere before."""
    if not whole:
        return {}
    where = resolve_device(device)
    on_gpu = where != "cpu"
    turn = threading.Lock() if on_gpu else contextlib.nullcontext()
    at_once = 2 if on_gpu else at_once_in_memory(whole)

    def merge(pair: tuple[Parameter, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
        parameter, method = pair
        known = _known(stats, parameter, method)
        base, models = parameter.whole()
        with turn:
            merged, info = method.merge_whole(base, models, parameter, device=where, stats=known)
        del base, models
        flat = np.ascontiguousarray(merged, np.float32).reshape(-1)
        sink.write(parameter.name, flat)
        tell(flat.size * itemsizes[parameter.name])
        return parameter.name, info

    threads = Threads(min(count, at_once))
    return dict(threads.each(merge, whole, lambda pair: pair[0], progress.advance))


def resolve_device(device: str) -> str:
    """`auto` is a GPU where torch sees one.

    Raises:
        InputError: `cuda` where there is none, or a word that names no device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError:
        raise InputError(f"device: no device `{device}`; expected auto, cpu or cuda") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: `{device}` is asked for, torch {torch.__version__} sees no GPU")
    return device


def whole_bytes(parameter: Parameter, method: Any) -> int:
    """Memory that merging one parameter whole takes."""
    count = parameter.num_models
    if not hasattr(method, "whole_bytes"):
        return 4 * parameter.numel * (2 * count + 2)
    return 4 * parameter.numel + method.whole_bytes(parameter.shape, count)


def at_once_in_memory(whole: Sequence[tuple[Parameter, Any]]) -> int:
    """How many of the largest whole matrices fit into the free memory together, at least one."""
    largest = max(whole_bytes(parameter, method) for parameter, method in whole)
    return max(1, int(free_bytes() * _MEMORY_SHARE) // max(largest, 1))


def _copy(output: Output, sink: Sink) -> None:
    """Stored bytes as they are."""
    origin = output.models[0]
    step = max(1, _COPIED_BYTES // max(1, round(output.spec.nbytes / max(output.spec.numel, 1))))
    for start in range(0, output.spec.numel, step):
        stop = min(start + step, output.spec.numel)
        sink.write_raw(output.spec.name, origin.checkpoint.read_raw(origin.name, start, stop), start)
