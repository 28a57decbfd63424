"""Checkpoint folders as the candidates of one run: opened, in the order of their steps, of one shape. No
torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError, InputError
from weightsmith.tensors.floats import FLOAT_DTYPES


def run_folders(folder: str | Path, pattern: str = "checkpoint-*") -> list[Path]:
    """The checkpoints of a Trainer's output folder, in the order of their steps.

    Raises:
        InputError: none is there.
    """
    found = [path for path in Path(folder).glob(pattern) if path.is_dir() and _number(path) is not None]
    if not found:
        raise InputError(f"{folder}: no folders `{pattern}` that end in a step")
    return sorted(found, key=lambda path: _number(path) or 0)


def states_of(inputs: Sequence[str]) -> list[str]:
    """The states behind one path: a checkpoint itself, those that a run's folder holds, or those that a stage
    of a recipe has kept.
    """
    (name,) = inputs
    folder = Path(name)
    if not folder.is_dir() or any(
        (folder / file).is_file() for file in ("config.json", "adapter_config.json")
    ):
        return list(inputs)
    place = folder / "states" if (folder / "states").is_dir() else folder
    return [str(path) for path in run_folders(place, "*-*")]


def open_candidates(
    folders: Sequence[str | Path | Checkpoint], steps: Sequence[int] | None = None
) -> tuple[list[Checkpoint], tuple[int, ...]]:
    """Checkpoints and their steps, oldest first.

    Args:
        folders: Checkpoint folders, or opened checkpoints.
        steps: Training step of each; the number at the end of each folder's name when left out, or their
            order where a name has none.

    Raises:
        InputError: there are none, or another number of steps.
        CheckpointError: a folder can't be read, or they are not states of one model.
    """
    if not folders:
        raise InputError("there are no candidates to average")
    if steps is not None and len(steps) != len(folders):
        raise InputError(f"expected a step for each of {len(folders)} candidates, got {len(steps)}")
    opened = [item if isinstance(item, Checkpoint) else Checkpoint.open(item) for item in folders]
    found = list(steps) if steps is not None else [_number(checkpoint.path) for checkpoint in opened]
    numbers = [index if None in found else number or 0 for index, number in enumerate(found)]
    order = sorted(range(len(opened)), key=lambda index: numbers[index])
    checkpoints = [opened[index] for index in order]
    check_alike(checkpoints)
    return checkpoints, tuple(numbers[index] for index in order)


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse candidates that are not states of one model.

    Raises:
        CheckpointError: packed weights, or names, shapes or kinds that differ from the last candidate's;
            names the tensor and both.
    """
    last = checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.quantized:
            raise CheckpointError(
                f"{checkpoint.name}: {checkpoint.quantized}; averaging needs plain float weights"
            )
        ours, theirs = checkpoint.config.get("model_type"), last.config.get("model_type")
        if ours != theirs:
            raise CheckpointError(f"{checkpoint.name} is a `{ours}`, {last.name} a `{theirs}`; not one run")
        for name in sorted(checkpoint.tensors.keys() ^ last.tensors.keys()):
            holder, other = (checkpoint, last) if name in checkpoint.tensors else (last, checkpoint)
            raise CheckpointError(f"{holder.name} has a tensor `{name}`, {other.name} has none; not one run")
        for name, info in last.tensors.items():
            found = checkpoint.tensors[name]
            if found.shape != info.shape:
                raise CheckpointError(
                    f"{name} is {list(found.shape)} in {checkpoint.name}, {list(info.shape)} in {last.name}; "
                    "not states of one run"
                )
            if (found.dtype in FLOAT_DTYPES) != (info.dtype in FLOAT_DTYPES):
                raise CheckpointError(
                    f"{name} is {found.dtype} in {checkpoint.name}, {info.dtype} in {last.name}"
                )


def _number(path: Path) -> int | None:
    match = re.search(r"(\d+)$", path.name)
    return int(match.group(1)) if match else None
