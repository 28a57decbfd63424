"""Zero tokens in files, before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightsmith.checkpoints.folder import INDEX_FILE, WEIGHTS_FILE, open_weights, read_config
from weightsmith.errors import CheckpointError
from weightsmith.training.zero_token import options
from weightsmith.training.zero_token.config import ZTTConfig


def check_pool(folder: Path, config: Any) -> None:
    """Compare shapes of zero tokens in files with those of the config, before anything is loaded.

    Args:
        folder: With safetensors; others, and names on the hub, are left to transformers.
        config: What the model is made from; anything but a `ZTTConfig` for that of the folder.

    Raises:
        CheckpointError: names both shapes.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return
    values = config.to_dict() if isinstance(config, ZTTConfig) else read_config(folder)
    if values.get("model_type") != options.MODEL_TYPE:
        return
    wanted = options.extra_shapes(ZTTConfig.from_dict(dict(values)).to_dict())
    files = open_weights(folder)
    try:
        for name, shape in wanted.items():
            found = files.tensors.get(name)
            if found is not None and found.shape != shape:
                raise CheckpointError(
                    f"{folder.name}: {name} is {found.shape}, the config needs {shape} (cycles, layers, "
                    "heads); load it with its own config and change that with `resize_cycles`"
                )
    finally:
        files.close()
