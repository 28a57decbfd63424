"""Masks in files, whose form `checkpoints/masks.py` tells: written, read back, and fitted to a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.checkpoints.masks import FORMAT, masks_file, stored_masks
from weightsmith.compression.nm.masks import codes_of_mask, repair_mask
from weightsmith.compression.nm.oneshot import Mask, Masks
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.compression.nm.targets import Target
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.atomic import write_bytes

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
    found = stored_masks(source)
    try:
        return {
            name: Mask(torch.from_numpy(mask.kept), Pattern(mask.n, mask.m), mask.dim)
            for name, mask in found.items()
        }
    except InputError as problem:
        raise CheckpointError(f"{masks_file(source)}: damaged masks: {problem}") from problem


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


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
