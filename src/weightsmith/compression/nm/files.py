"""Files of masks: one bit a weight, in safetensors.

{parameter}.mask   uint8, the mask of the flattened parameter, first entry in the lowest bit
metadata           under the parameter's name: {"n", "m", "dim", "shape"} as JSON
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightsmith.checkpoints.folder import MASKS_FILE
from weightsmith.compression.nm.masks import codes_of_mask, repair_mask
from weightsmith.compression.nm.oneshot import Mask, Masks
from weightsmith.compression.nm.options import masks_file
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.compression.nm.targets import Target
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.atomic import system_faults, write_bytes

FORMAT = 1
_SHOWN = 3


def masks_bytes(masks: Masks) -> bytes:
    """The content of a file of masks."""
    facts = {"format": str(FORMAT)}
    parts: list[bytes] = []
    header: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, mask in sorted(masks.items()):
        kept = mask.kept.detach().cpu().numpy()
        shape = {"n": mask.pattern.n, "m": mask.pattern.m, "dim": mask.dim, "shape": list(kept.shape)}
        facts[name] = json.dumps(shape)
        parts.append(np.packbits(kept.reshape(-1), bitorder="little").tobytes())
        start, end = end, end + len(parts[-1])
        header[f"{name}.mask"] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    # Written here because the library puts metadata in an order that differs from run to run.
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *parts])


def write_masks(path: str | Path, masks: Masks) -> None:
    """Write a file of masks, in one step.

    Raises:
        SystemFault: no space, no permission.
    """
    write_bytes(path, masks_bytes(masks))


def read_masks(source: str | Path) -> Masks:
    """The masks of a file, or of a pruned checkpoint's folder.

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


def codes_from(
    masks: Mapping[str, Mask | Tensor], targets: Sequence[Target], pattern: Pattern, *, repair: bool
) -> tuple[dict[str, Tensor], int]:
    """Masks from elsewhere as integers, and how many of their groups had to be completed.

    Raises:
        InputError: masks of other parameters or shapes; groups that don't keep exactly N, unless `repair`.
    """
    wanted = {target.name: target for target in targets}
    missing, extra = [name for name in wanted if name not in masks], [n for n in masks if n not in wanted]
    if missing or extra:
        said = [
            f"{what} {_some(names)}" for what, names in (("missing", missing), ("not pruned", extra)) if names
        ]
        raise InputError(f"masks don't fit the model's targets: {'; '.join(said)}")
    codes: dict[str, Tensor] = {}
    repaired = 0
    for name, target in wanted.items():
        given = masks[name]
        kept = given.kept if isinstance(given, Mask) else given
        if tuple(kept.shape) != target.shape:
            raise InputError(f"{name}: mask of {list(kept.shape)}, the parameter is {list(target.shape)}")
        kept = kept.to(target.parameter.device, torch.bool)
        if repair:
            kept, count = repair_mask(kept, target.parameter, pattern.n, pattern.m, dim=target.dim)
            repaired += count
        codes[name] = codes_of_mask(name, kept, pattern, target.dim)
    return codes, repaired


def _unpacked(packed: np.ndarray, text: str) -> Mask:
    facts = json.loads(text)
    shape = tuple(facts["shape"])
    count = int(np.prod(shape))
    if packed.size != -(-count // 8):
        raise ValueError(f"{packed.size} bytes for {count} weights")
    bits = np.unpackbits(packed, count=count, bitorder="little").view(np.bool_).reshape(shape)
    return Mask(torch.from_numpy(bits), Pattern(facts["n"], facts["m"]), facts["dim"])


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
