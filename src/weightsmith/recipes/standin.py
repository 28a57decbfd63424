"""A stand-in for a checkpoint that does not exist yet: the same files, headers and sizes, and no weights.

A dry run plans each stage on the stand-ins of the stages above it, with the very code that will do the work,
so its numbers can't drift from what happens. The tensors' bytes are holes: reading gives zeros, the disk
holds nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.checkpoints.folder import INDEX_FILE, LINEAGE_FILE
from weightsmith.checkpoints.layout import MAX_SHARD_BYTES, TensorSpec, plan_layout
from weightsmith.checkpoints.lineage import Lineage

_CONTENT = "full:" + "0" * 32


def write_standin(
    folder: Path,
    specs: Sequence[TensorSpec],
    *,
    side_files: Mapping[str, Path | bytes],
    lineage: Lineage | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write what `CheckpointWriter` would write with the same arguments, with holes for weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    layout = plan_layout(specs, max_shard_bytes)
    for shard in layout.shards:
        with open(folder / shard.file, "wb") as file:
            file.write(shard.head)
            file.truncate(shard.size)
    if layout.index is not None:
        (folder / INDEX_FILE).write_bytes(layout.index)
    for name, item in side_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(item if isinstance(item, bytes) else item.read_bytes())
    if lineage is not None:
        # The real one carries the full fingerprint of its weights, which is as long for any weights.
        (folder / LINEAGE_FILE).write_bytes(dataclasses.replace(lineage, content=_CONTENT).to_bytes())
    return folder


def folder_bytes(folder: Path) -> int:
    """Sizes of all files of a folder, added up."""
    return sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
