"""One plain checkpoint out of a mediated model: for one task, or for any mix of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.checkpoints import Ancestor, CheckpointWriter, Lineage, TensorSpec
from weightsmith.merging.mediator.store import MediatorStore
from weightsmith.runs.environment import versions
from weightsmith.runs.progress import SILENT, Progress


def export_merged(
    mediated: str | Path | MediatorStore,
    mix: str | Mapping[str, float],
    out: str | Path,
    *,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> Path:
    """Write dense part plus weighted experts as an ordinary checkpoint, tensor by tensor.

    Args:
        mediated: A mediated model's folder, or an opened one.
        mix: A task, or a weight for each task (those left out are 0).
        out: Folder to make.
        progress: Told the elements written.
        overwrite: Replace `out` when it exists and is a checkpoint.

    Raises:
        InputError: no such task, or a weight that is not finite.
        CheckpointError: the folder is no mediated model, or `out` exists.
        SystemFault: the disk is full or failed.
    """
    if not isinstance(mediated, MediatorStore):
        with MediatorStore.open(mediated) as store:
            return export_merged(store, mix, out, progress=progress, overwrite=overwrite)
    store, weights = mediated, mediated.weights_of(mix)
    source = store.checkpoint
    specs = [TensorSpec(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    lineage = Lineage(
        "mediator_export",
        {"weights": weights},
        None,
        (Ancestor.of(source, "mediated"),),
        versions(("weightsmith", "numpy")),
    )
    routed = set(store.routed_tensors)
    progress.start("export", float(sum(spec.numel for spec in specs)), "elements")
    with CheckpointWriter(
        out, specs, side_files=source.side_file_map(), lineage=lineage, overwrite=overwrite
    ) as writer:
        for spec in specs:
            if spec.name in routed or store.is_changed(spec.name):
                writer.write(spec.name, store.merged(spec.name, weights))
            else:
                writer.write_raw(spec.name, source.read_raw(spec.name))
            progress.advance(float(spec.numel))
        progress.done()
        return writer.commit()
