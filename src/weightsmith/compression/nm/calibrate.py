"""What the inputs of each layer look like, block by block, each block's inputs from pruned blocks before it.

Problem  Statistics of a dense model are those of inputs that the pruned model never sees.
Method   Every block is run twice on all batches: once as it is, to measure the inputs of its layers; once
         pruned, to make what the next block gets. Blocks are found, not known: the list of modules that holds
         most of what is pruned. What a block is called with is recorded from the model's own forward pass.
         Where blocks don't simply hand their output on (checked on the first batch), the model is run from
         its start for every block instead, up to the block's end: more work, the same result for any model.
Padding  Rows whose `attention_mask` is 0 don't count.
Cost     Two forward passes over all blocks; memory for the hidden states of all batches.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.compression.nm.batches import Batch, call, to_device
from weightsmith.compression.nm.masks import expect_finite
from weightsmith.compression.nm.targets import Target
from weightsmith.errors import InputError
from weightsmith.runs.progress import SILENT, Progress

Kind = Literal["norms", "hessian"]


@dataclass
class InputStatistics:
    """What was measured of the inputs of one parameter.

    Attributes:
        squares: Sum over all rows of x² (inputs,), or of x xᵀ (inputs, inputs); float32.
        rows: How many rows (tokens) there were.
    """

    squares: Tensor
    rows: int = 0

    @property
    def norms(self) -> Tensor:
        """Norm of each input over all rows."""
        return (self.squares if self.squares.ndim == 1 else self.squares.diagonal()).sqrt()

    def add(self, inputs: Tensor) -> None:
        """Take rows (rows, inputs)."""
        inputs = inputs.float()
        if self.squares.ndim == 1:
            self.squares += inputs.square().sum(0)
        else:
            self.squares.addmm_(inputs.t(), inputs)
        self.rows += len(inputs)


class _Stop(Exception):
    """Ends a forward pass at the end of a block."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    kind: Kind,
    prune: Callable[[Target, InputStatistics], None],
    *,
    run: Callable[[nn.Module, Batch], Any] = call,
    progress: Progress = SILENT,
) -> None:
    """Walk the model's blocks in order; measure the inputs of each block's targets, then prune them.

    Args:
        model: In eval mode.
        targets: What to prune; each must be the weight of a layer.
        batches: What the model is called with: mappings of keyword arguments, tuples of positional ones, or
            one tensor.
        kind: What to measure.
        prune: Called with each target and its statistics; changes its weight in place.
        run: Runs the model on a batch.
        progress: Told about blocks.

    Raises:
        InputError: no batches; a target whose inputs no hook can see, that got none, or whose inputs' squares
            don't add up to finite numbers.
    """
    kept = [to_device(batch, next(model.parameters()).device) for batch in batches]
    if not kept:
        raise InputError("calibration needs at least one batch, got none")
    hidden = [target.name for target in targets if not target.modules]
    if hidden:
        raise InputError(
            f"{hidden[0]}: inputs of stacked experts pass no module where they could be measured; prune them "
            "by magnitude, or begin MaskPro with it"
        )
    blocks, outside = split_blocks(model, targets)
    walk: _Walk = _Chain(model, kept, blocks, run) if blocks else _Whole(model, kept, [], run)
    if not walk.holds():
        walk = _Whole(model, kept, blocks, run)
    progress.start("calibrating", len(blocks) + bool(outside), "blocks")
    for number, block in enumerate(blocks):
        inside = {id(module) for module in block.modules()}
        mine = [target for target in targets if id(target.modules[0]) in inside]
        _measure_and_prune(mine, kind, kept, lambda i, n=number: walk.run(n, i), prune)
        walk.finish(number)
        progress.advance(1)
    if outside:
        whole = _Whole(model, kept, [], run)
        _measure_and_prune(outside, kind, kept, lambda i: whole.run(0, i), prune)
        progress.advance(1)
    progress.done()


def split_blocks(model: nn.Module, targets: Sequence[Target]) -> tuple[list[nn.Module], list[Target]]:
    """The blocks of a model in order, and the targets that are in none.

    The list (`ModuleList` or `Sequential`) whose modules hold most targets; of equal ones the outermost.
    """
    owners = [id(target.modules[0]) for target in targets]
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            inside = {id(part) for part in module.modules()}
            held = sum(owner in inside for owner in owners)
            if held > most:
                best, most = list(module), held
    inside = {id(part) for block in best for part in block.modules()}
    return best, [target for target, owner in zip(targets, owners, strict=True) if owner not in inside]


@dataclass
class _Walk(abc.ABC):
    """How blocks are run."""

    model: nn.Module
    batches: Sequence[Batch]
    blocks: Sequence[nn.Module]
    call: Callable[[nn.Module, Batch], Any]

    def holds(self) -> bool:
        """Whether this way of walking is right for the model."""
        return True

    @abc.abstractmethod
    def run(self, number: int, i: int) -> Any:
        """Run a block on batch i."""

    @abc.abstractmethod
    def finish(self, number: int) -> None:
        """The block is pruned."""


class _Whole(_Walk):
    """The model from its start to the end of a block."""

    def run(self, number: int, i: int) -> None:
        def stop(*_: Any) -> None:
            raise _Stop

        with ExitStack() as hooks:
            if self.blocks:
                hooks.callback(self.blocks[number].register_forward_hook(stop).remove)
            with suppress(_Stop):
                self.call(self.model, self.batches[i])

    def finish(self, number: int) -> None:
        """Nothing is kept from block to block."""


@dataclass
class _Chain(_Walk):
    """One block at a time, on what the block before it gave."""

    def __post_init__(self) -> None:
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._hidden: list[Any] = []
        self._in_order = True
        for i in range(len(self.batches)):
            self._record(i)
            if not self._in_order:
                return

    def holds(self) -> bool:
        return self._in_order

    def run(self, number: int, i: int) -> Any:
        args, kwargs = self._calls[i][number]
        return _first(self.blocks[number](self._hidden[i], *args, **kwargs))

    def finish(self, number: int) -> None:
        if number + 1 < len(self.blocks):
            for i in range(len(self.batches)):
                self._hidden[i] = self.run(number, i)

    def _record(self, i: int) -> None:
        """Run the dense model once; note the first block's input and what else each block is called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        last: Any = None
        version = -1

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal version
            # Past the first block the input must be the very tensor that the block before returned, and
            # nothing else may carry state from block to block.
            number = len(calls)
            in_place = number < len(self.blocks) and self.blocks[number] is module and bool(args)
            handed_on = number == 0 or (in_place and args[0] is last)
            if not (in_place and handed_on and all(map(_is_plain, (*args[1:], *kwargs.values())))):
                self._in_order = False
                raise _Stop
            if number == 0:
                self._hidden.append(args[0])
            version = _version(args[0])
            calls.append((args[1:], kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal last
            last = _first(output)
            if _version(args[0]) != version:  # written over: it can't be run on a second time
                self._in_order = False
                raise _Stop
            if module is self.blocks[-1]:
                raise _Stop

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(after).remove)
            with suppress(_Stop):
                self.call(self.model, self.batches[i])
        self._in_order &= len(calls) == len(self.blocks)
        self._calls.append(calls)


def _measure_and_prune(
    targets: Sequence[Target],
    kind: Kind,
    batches: Sequence[Batch],
    run: Callable[[int], Any],
    prune: Callable[[Target, InputStatistics], None],
) -> None:
    found: dict[str, InputStatistics] = {}
    mask: Tensor | None = None
    with ExitStack() as hooks:
        for target in targets:
            size = target.shape[target.dim]
            shape = (size,) if kind == "norms" else (size, size)
            found[target.name] = InputStatistics(torch.zeros(shape, device=target.parameter.device))
            for module in target.modules:

                def see(
                    _: nn.Module, args: tuple[Any, ...], statistics: InputStatistics = found[target.name]
                ) -> None:
                    statistics.add(_rows(args[0], mask))

                hooks.callback(module.register_forward_pre_hook(see).remove)
        for i, batch in enumerate(batches):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            run(i)
    for target in targets:
        if not found[target.name].rows:
            raise InputError(
                f"{target.name}: its layer got no inputs in calibration; ignore it, prune it by magnitude, "
                "or give more data"
            )
        # A finite diagonal bounds all other sums of products.
        expect_finite(target.name, found[target.name].norms, "norms of its inputs over the calibration data")
    for target in targets:
        prune(target, found[target.name])


def _rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs as rows (rows, inputs), those of padding left out where they can be told."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is not None and mask.ndim == 2 and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).bool()]
    return rows


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _version(value: Any) -> int:
    """How often a tensor was written to."""
    return value._version if isinstance(value, Tensor) else 0


def _is_plain(value: Any) -> bool:
    """Whether an argument is the same for every run: tensors and numbers are, caches and lists are not."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
