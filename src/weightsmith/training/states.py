"""States that a run keeps beside its result (`average: keep`): whole checkpoints, one for each step taken.

A state is stored in float32, as it was in training: what averaging gains is smaller than what bfloat16 rounds
away. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.checkpoints import Lineage, TensorSpec, plan_layout
from weightsmith.tensors.floats import FLOAT_DTYPES

PREFIX = "step-"


def state_folder(folder: Path, step: int) -> Path:
    """Where the state after an optimiser step lies."""
    return folder / f"{PREFIX}{step}"


def state_specs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of a state of a run whose result has `specs`."""
    return tuple(
        TensorSpec(spec.name, "F32" if spec.dtype in FLOAT_DTYPES else spec.dtype, spec.shape)
        for spec in specs
    )


def state_lineage(lineage: Lineage, step: int) -> Lineage:
    """What a state's `weightsmith.json` says."""
    return dataclasses.replace(lineage, parameters={**lineage.parameters, "state_of_step": step})


def folder_bytes(specs: Sequence[TensorSpec], files: Mapping[str, Path | bytes], lineage: Lineage) -> int:
    """Exact size of a checkpoint folder to be written."""
    size = plan_layout(specs).total_bytes
    # The real one carries the full fingerprint of its weights, which is as long for any weights.
    size += len(dataclasses.replace(lineage, content="full:" + "0" * 32).to_bytes())
    return size + sum(
        len(item) if isinstance(item, bytes) else item.stat().st_size for item in files.values()
    )
