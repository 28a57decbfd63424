"""A test-bed that every machine can make: small models, real text domains, exact skills. No torch, no
network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.testbed.alphabet import CHARACTERS, VOCABULARY
    from weightsmith.testbed.domains import DOMAINS, documents, passages, text
    from weightsmith.testbed.models import (
        SIZES,
        model_config,
        model_files,
        parameter_shapes,
        write_model_folder,
    )
    from weightsmith.testbed.skills import ALIGNMENT, SKILL_GROUPS, SKILLS, Dial, Item, chance, items
    from weightsmith.testbed.tasks import FINETUNES, TASK_SETS, TASKS, expand, fingerprint

_HOMES = {
    "ALIGNMENT": "skills",
    "CHARACTERS": "alphabet",
    "DOMAINS": "domains",
    "Dial": "skills",
    "FINETUNES": "tasks",
    "Item": "skills",
    "SIZES": "models",
    "SKILLS": "skills",
    "SKILL_GROUPS": "skills",
    "TASKS": "tasks",
    "TASK_SETS": "tasks",
    "VOCABULARY": "alphabet",
    "chance": "skills",
    "documents": "domains",
    "expand": "tasks",
    "fingerprint": "tasks",
    "items": "skills",
    "model_config": "models",
    "model_files": "models",
    "parameter_shapes": "models",
    "passages": "domains",
    "text": "domains",
    "write_model_folder": "models",
}

__all__ = [
    "ALIGNMENT",
    "CHARACTERS",
    "DOMAINS",
    "FINETUNES",
    "SIZES",
    "SKILLS",
    "SKILL_GROUPS",
    "TASKS",
    "TASK_SETS",
    "VOCABULARY",
    "Dial",
    "Item",
    "chance",
    "documents",
    "expand",
    "fingerprint",
    "items",
    "model_config",
    "model_files",
    "parameter_shapes",
    "passages",
    "text",
    "write_model_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
