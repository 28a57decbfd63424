"""Files of masks, which say what a pruned checkpoint keeps: one bit a weight, in safetensors.

{parameter}.mask   uint8, the mask of the flattened parameter, first entry in the lowest bit
metadata           under the parameter's name: {"n", "m", "dim", "shape"} as JSON

Read here, where all that follows a pruned model can; written by what prunes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from weightsmith.checkpoints.folder import MASKS_FILE
from weightsmith.errors import CheckpointError
from weightsmith.runs.atomic import system_faults

FORMAT = 1


class StoredMask(NamedTuple):
    """The mask of one parameter.

    Attributes:
        kept: bool, of the parameter's shape.
        n: Weights kept in each group, as the file says.
        m: Weights in a group.
        dim: Axis of the inputs.
    """

    kept: np.ndarray
    n: int
    m: int
    dim: int


def masks_file(source: str | Path) -> Path:
    """Where the masks of a file, or of a pruned checkpoint's folder, lie."""
    path = Path(source).expanduser()
    return path / MASKS_FILE if path.is_dir() else path


def stored_masks(source: str | Path) -> dict[str, StoredMask]:
    """The masks of a file, or of a pruned checkpoint's folder, by parameter's name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = masks_file(source)
    if not path.is_file():
        raise CheckpointError(f"{source}: no masks; expected a file of masks, or a folder with {MASKS_FILE}")
    try:
        with system_faults(path), safe_open(str(path), framework="np") as file:
            facts = file.metadata() or {}
            if facts.pop("format", None) != str(FORMAT):
                raise CheckpointError(f"{path}: not a file of masks of format {FORMAT}")
            return {name: _unpacked(file.get_tensor(f"{name}.mask"), text) for name, text in facts.items()}
    except (SafetensorError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged masks: {problem}") from problem


def _unpacked(packed: np.ndarray, text: str) -> StoredMask:
    facts = json.loads(text)
    shape = tuple(facts["shape"])
    count = int(np.prod(shape))
    if packed.size != -(-count // 8):
        raise ValueError(f"{packed.size} bytes for {count} weights")
    bits = np.unpackbits(packed, count=count, bitorder="little").view(np.bool_).reshape(shape)
    return StoredMask(bits, facts["n"], facts["m"], facts["dim"])
