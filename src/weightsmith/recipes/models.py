"""What the model of a stage may be: an earlier stage, a size of the test-bed, a local folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from weightsmith.checkpoints.folder import looks_like_path
from weightsmith.errors import nearest

TESTBED = "testbed/"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", re.ASCII)


def problem_with(value: str, earlier: Iterable[str], *, needs_weights: bool) -> str | None:
    """Why `value` can't be the model of a stage, or None.

    Args:
        value: What the page says.
        earlier: Names of the stages above that make a model.
        needs_weights: Whether the stage starts from the model's weights.
    """
    earlier = list(earlier)
    if value in earlier:
        return None
    if value.startswith(TESTBED) and not Path(value).exists():
        from weightsmith.testbed import SIZES

        sizes = [TESTBED + size for size in SIZES]
        if value not in sizes:
            return f"no test-bed model `{value}`{nearest(value, sizes)}; known: {', '.join(sizes)}"
        return None if not needs_weights else f"`{value}` has no weights yet; only `train` starts from it"
    path = Path(value).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            return None
        return f"{value} is not a model: the folder has no config.json"
    if path.exists():
        return f"{value} is a file; a model is a folder with config.json and safetensors"
    if looks_like_path(value):
        return f"no such folder: {value}"
    if _HUB_ID.fullmatch(value):
        return None
    return f"`{value}` is neither a stage above, a folder, nor a hub id{nearest(value, earlier)}"
