"""What the bed can train on and be scored on, by name."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Literal

from weightsmith.errors import InputError, nearest
from weightsmith.testbed.domains import DOMAINS
from weightsmith.testbed.skills import ALIGNMENT, SKILL_GROUPS, SKILLS

Kind = Literal["domain", "skill", "alignment"]

_BY_KIND: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("domain", DOMAINS),
    ("skill", tuple(SKILLS)),
    ("alignment", tuple(ALIGNMENT)),
)
TASKS: dict[str, Kind] = {name: kind for kind, names in _BY_KIND for name in names}
"""Every task of the bed and its kind."""

TASK_SETS: dict[str, tuple[str, ...]] = {
    "domains": DOMAINS,
    "skills": tuple(SKILLS),
    "alignment": tuple(ALIGNMENT),
    "all": (*DOMAINS, *SKILLS),
    **{group: members for group, members in SKILL_GROUPS.items() if group not in SKILLS},
}
"""Names that stand for several tasks."""

NAMES: tuple[str, ...] = tuple(dict.fromkeys((*TASKS, *TASK_SETS)))
"""Every name that `expand` takes."""

FINETUNES: dict[str, tuple[str, ...]] = {
    **{f"D_{domain}": (domain,) for domain in DOMAINS},
    **{f"S_{group}": skills for group, skills in SKILL_GROUPS.items()},
    "A_help": ("help",),
    "A_honest": ("honest", "help"),
    "A_harmless": ("harmless", "help"),
}
"""The bed's fine-tunes and the tasks each is trained on. The last two see answerable questions too: a model
that only ever saw one answer would give no other."""


def expand(names: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Tasks behind names of tasks and sets, in order, each once.

    Raises:
        InputError: a name is neither; names the nearest.
    """
    found: dict[str, None] = {}
    for name in (names,) if isinstance(names, str) else names:
        if name not in TASKS and name not in TASK_SETS:
            raise InputError(f"no test-bed task `{name}`{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
        found.update(dict.fromkeys(TASK_SETS.get(name, (name,))))
    return tuple(found)


@functools.cache
def fingerprint() -> str:
    """Changes with the bed's code and with the Python whose files the domains are made of."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sys.version_info[:3]).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
