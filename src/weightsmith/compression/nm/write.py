"""A pruned checkpoint as a folder that anything loads: dense tensors with zeros, and the masks beside them.

Tensors go from the source's files to the new ones one at a time; what a mask keeps is the same bits, what it
drops is 0. `weightsmith/masks.safetensors` holds one bit a weight, under the names of the loaded model's
parameters, whatever the files call them (`stored`). Matrices packed for sparse tensor cores may lie beside
them (`packed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.folder import MASKS_FILE, label
from weightsmith.checkpoints.lineage import Ancestor, read_lineage
from weightsmith.compression.nm.files import masks_bytes
from weightsmith.compression.nm.oneshot import Masks
from weightsmith.compression.nm.options import PACKED_FACTS, PACKED_FILE
from weightsmith.compression.nm.packed import pack
from weightsmith.compression.nm.semi_structured import Library
from weightsmith.compression.nm.stored import stored_parts
from weightsmith.runs.environment import versions
from weightsmith.tensors.floats import DTYPE_BITS, from_float32


def write_pruned(
    source: str | Path | Checkpoint,
    masks: Masks,
    out: str | Path,
    *,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
    first: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    library: Library | None = None,
) -> Path:
    """Write the folder `out`: `source` under `masks`.

    Args:
        source: The dense model's folder, hub id, or opened checkpoint.
        masks: By parameter's name.
        out: Folder to make.
        method: Id of what made the masks, for the lineage.
        parameters: Its options as JSON values.
        seed: Of the method, where it has one.
        first: The file of masks that it began with, where it did, for the lineage.
        weights: Values that take the place of the source's, for methods that move what they keep (SparseGPT).
        overwrite: Replace `out` when it exists and is a checkpoint.
        library: Also pack the matrices for it, on this machine's CUDA device.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: the source can't be read, has no such tensor, or one of another shape; `out` exists.
        MissingExtraError: files have other names than masks, and transformers isn't installed.
        SystemFault: the disk is full or failed.
    """
    if isinstance(source, Checkpoint):
        return _write(
            source, masks, Path(out), method, parameters, seed, first, weights or {}, overwrite, library
        )
    with Checkpoint.open(source) as checkpoint:
        return _write(
            checkpoint, masks, Path(out), method, parameters, seed, first, weights or {}, overwrite, library
        )


def _write(
    source: Checkpoint,
    masks: Masks,
    out: Path,
    method: str,
    parameters: Mapping[str, Any] | None,
    seed: int | None,
    first: Path | None,
    weights: Mapping[str, Tensor],
    overwrite: bool,
    library: Library | None,
) -> Path:
    parts = stored_parts(source, {name: mask.kept.detach().cpu() for name, mask in masks.items()})
    kept = {stored: part for of_one in parts.values() for stored, part in of_one.items()}
    moved = {name: weights[name].detach().float().cpu() for name in masks if name in weights}
    values = {
        stored: part for of_one in stored_parts(source, moved).values() for stored, part in of_one.items()
    }
    specs = [TensorSpec(info.name, info.dtype, tuple(info.shape)) for info in source.tensors.values()]
    lineage = Lineage(
        method=method,
        parameters=dict(parameters or {}),
        seed=seed,
        inputs=(Ancestor.of(source, "model"), *([_of_masks(first)] if first is not None else ())),
        versions=versions(),
    )
    side: dict[str, Path | bytes] = {**source.side_file_map(), MASKS_FILE: masks_bytes(masks)}

    def pruned(stored: str) -> np.ndarray:
        """Bytes of a tensor under its mask."""
        dtype, flat = source.tensors[stored].dtype, kept[stored].reshape(-1).numpy()
        if stored in values:
            new = values[stored].reshape(-1).numpy()
            return from_float32(np.where(flat, new, np.float32(0)), dtype).view(np.uint8)
        raw = source.read_raw(stored).reshape(-1, DTYPE_BITS[dtype] // 8)
        return np.where(flat[:, None], raw, np.uint8(0)).reshape(-1)

    matrices = None
    if library is not None:
        # What can be packed is one matrix, stored as it is.
        of_each = ((name, next(iter(part))) for name, part in parts.items())
        named = ((name, source.tensors[stored].dtype, pruned(stored)) for name, stored in of_each)
        matrices = pack(named, masks, library)
        side[PACKED_FACTS] = matrices.facts_bytes()
    with CheckpointWriter(
        out,
        specs,
        side_files=side,
        lineage=lineage,
        overwrite=overwrite,
        parts={PACKED_FILE: matrices.specs()} if matrices is not None else None,
    ) as writer:
        for spec in specs:
            raw = pruned(spec.name) if spec.name in kept else source.read_raw(spec.name)
            writer.write_raw(spec.name, raw)
        for name, raw in matrices.raw() if matrices is not None else ():
            writer.write_raw(name, raw)
        return writer.commit()


def _of_masks(file: Path) -> Ancestor:
    """A file of masks as an input; one beside a checkpoint is called by it, and has its lineage."""
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    beside = file.parent.parent if file.parent.parent / MASKS_FILE == file else None
    return Ancestor(
        role="masks",
        name=label(beside) if beside else file.name,
        fingerprint=f"masks:{content}",
        lineage=read_lineage(beside) if beside else None,
    )
