"""Hugging Face checkpoints: read lazily, written once and whole, with their family tree.

Names load on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.checkpoints.header import TensorInfo
    from weightsmith.checkpoints.layout import Layout, TensorSpec, plan_layout
    from weightsmith.checkpoints.lineage import Ancestor, Lineage
    from weightsmith.checkpoints.names import layer_index
    from weightsmith.checkpoints.reader import Checkpoint
    from weightsmith.checkpoints.structure import summarise
    from weightsmith.checkpoints.tracing import trace
    from weightsmith.checkpoints.writer import CheckpointWriter

_HOMES = {
    "Ancestor": "lineage",
    "Checkpoint": "reader",
    "CheckpointWriter": "writer",
    "Layout": "layout",
    "Lineage": "lineage",
    "TensorInfo": "header",
    "TensorSpec": "layout",
    "layer_index": "names",
    "plan_layout": "layout",
    "summarise": "structure",
    "trace": "tracing",
}

__all__ = [
    "Ancestor",
    "Checkpoint",
    "CheckpointWriter",
    "Layout",
    "Lineage",
    "TensorInfo",
    "TensorSpec",
    "layer_index",
    "plan_layout",
    "summarise",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
