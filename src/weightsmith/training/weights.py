"""Between a model in memory and the tensors that its checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError
from weightsmith.tensors.floats import FLOAT_DTYPES


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that files use, aliases of tied weights left out.

    Loading may rename, split or fuse tensors (a mixture's experts are one tensor in memory and many in the
    files); transformers knows the way back.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return revert_weight_conversion(model, state)


def write_model(
    model: Any,
    out: str | Path,
    specs: Sequence[TensorSpec],
    *,
    side_files: Mapping[str, Path | bytes],
    lineage: Lineage,
    source: str | Path | None,
    overwrite: bool,
) -> Path:
    """Write a trained model as the planned tensors, in one rename.

    Tensors of the source that the model doesn't have (buffers of old versions, heads that are not loaded) are
    carried over as they are. Files of some families lack the model's own prefix.

    Raises:
        CheckpointError: the model has a tensor of another shape than planned, or lacks one that nothing
            gives.
        SystemFault: the disk is full or failed.
    """
    state = stored_tensors(model)
    known = {**model.state_dict(), **state}
    every = {
        name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in known.items()
    } | known
    with CheckpointWriter(out, specs, side_files=side_files, lineage=lineage, overwrite=overwrite) as writer:
        for spec in specs:
            tensor = every.get(spec.name)
            if tensor is None or spec.dtype not in FLOAT_DTYPES:
                writer.write_raw(spec.name, _stored(source, spec))
                continue
            if tuple(tensor.shape) != spec.shape:
                raise CheckpointError(
                    f"{spec.name}: trained as {tuple(tensor.shape)}, planned as {spec.shape}"
                )
            writer.write(spec.name, tensor.detach().to("cpu", torch.float32).contiguous().numpy())
        return writer.commit()


def _stored(source: str | Path | None, spec: TensorSpec) -> np.ndarray:
    if source is None:
        raise CheckpointError(f"{spec.name}: planned, but the model has no such tensor")
    with Checkpoint.open(source) as checkpoint:
        return checkpoint.read_raw(spec.name)
