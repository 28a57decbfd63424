"""A pruned checkpoint as a folder that anything loads: dense tensors with zeros, and the masks beside them.

Tensors go from the source's files to the new ones one at a time; what a mask keeps is the same bits, what it
drops is 0. `weightsmith/masks.safetensors` holds one bit a weight. Matrices packed for sparse tensor cores
may lie beside them (`packed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.lineage import Ancestor
from weightsmith.compression.nm.files import masks_bytes
from weightsmith.compression.nm.oneshot import Masks
from weightsmith.compression.nm.options import MASKS_FILE, PACKED_FACTS, PACKED_FILE
from weightsmith.compression.nm.packed import pack
from weightsmith.compression.nm.semi_structured import Library
from weightsmith.errors import CheckpointError
from weightsmith.runs.environment import versions
from weightsmith.tensors.floats import DTYPE_BITS, FLOAT_DTYPES, from_float32


def write_pruned(
    source: str | Path | Checkpoint,
    masks: Masks,
    out: str | Path,
    *,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
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
        weights: Values that take the place of the source's, for methods that move what they keep (SparseGPT).
        overwrite: Replace `out` when it exists and is a checkpoint.
        library: Also pack the matrices for it, on this machine's CUDA device.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: the source can't be read, has no such tensor, or one of another shape; `out` exists.
        SystemFault: the disk is full or failed.
    """
    if isinstance(source, Checkpoint):
        return _write(source, masks, Path(out), method, parameters, seed, weights or {}, overwrite, library)
    with Checkpoint.open(source) as checkpoint:
        return _write(
            checkpoint, masks, Path(out), method, parameters, seed, weights or {}, overwrite, library
        )


def _write(
    source: Checkpoint,
    masks: Masks,
    out: Path,
    method: str,
    parameters: Mapping[str, Any] | None,
    seed: int | None,
    weights: Mapping[str, Tensor],
    overwrite: bool,
    library: Library | None,
) -> Path:
    _check(source, masks)
    specs = [TensorSpec(info.name, info.dtype, tuple(info.shape)) for info in source.tensors.values()]
    lineage = Lineage(
        method=method,
        parameters=dict(parameters or {}),
        seed=seed,
        inputs=(Ancestor.of(source, "model"),),
        versions=versions(),
    )
    side: dict[str, Path | bytes] = {**source.side_file_map(), MASKS_FILE: masks_bytes(masks)}

    def pruned(spec: TensorSpec) -> np.ndarray:
        """Bytes of a matrix under its mask."""
        kept = masks[spec.name].kept.detach().cpu().reshape(-1).numpy()
        if spec.name in weights:
            values = weights[spec.name].detach().float().cpu().reshape(-1).numpy()
            return from_float32(np.where(kept, values, np.float32(0)), spec.dtype).view(np.uint8)
        raw = source.read_raw(spec.name).reshape(-1, DTYPE_BITS[spec.dtype] // 8)
        return np.where(kept[:, None], raw, np.uint8(0)).reshape(-1)

    matrices = None
    if library is not None:
        stored = ((spec.name, spec.dtype, pruned(spec)) for spec in specs if spec.name in masks)
        matrices = pack(stored, masks, library)
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
            raw = pruned(spec) if spec.name in masks else source.read_raw(spec.name)
            writer.write_raw(spec.name, raw)
        for name, raw in matrices.raw() if matrices is not None else ():
            writer.write_raw(name, raw)
        return writer.commit()


def _check(source: Checkpoint, masks: Masks) -> None:
    if source.quantized:
        raise CheckpointError(f"{source.name}: {source.quantized}; prune the model before it is quantised")
    for name, mask in masks.items():
        info = source.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{source.name}: has no tensor `{name}`; the masks are of a model that stores its weights "
                "under other names. Nothing was written."
            )
        if tuple(info.shape) != tuple(mask.kept.shape):
            raise CheckpointError(
                f"{source.name}: {name} is {list(info.shape)}, its mask {list(mask.kept.shape)}. Nothing was "
                "written."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{source.name}: {name} is {info.dtype}, no plain weights. Nothing was written."
            )
