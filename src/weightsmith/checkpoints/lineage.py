"""What made a checkpoint: the file `weightsmith.json` beside its weights.

It holds the method, its parameters, the seed, package versions, and for each input a name and the
fingerprints of its content, together with that input's own lineage: the family tree survives when the
ancestors' folders are gone. No times, paths or host names, so the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.folder import LINEAGE_FILE, read_object
from weightsmith.errors import CheckpointError

if TYPE_CHECKING:
    from weightsmith.checkpoints.reader import Checkpoint

FORMAT = 1
"""Version of the file's layout, stored under `format`."""


@dataclass(frozen=True)
class Ancestor:
    """One input of a checkpoint.

    Attributes:
        role: What it was used as: "base", "model", ...
        name: Its label; a folder name or hub id, never a path.
        fingerprint: Its quick content fingerprint.
        lineage: What made it; None when it came without a `weightsmith.json`.
        content: Its full fingerprint where it was known without reading it again, else None.
    """

    role: str
    name: str
    fingerprint: str
    lineage: Lineage | None = None
    content: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, role: str, *, full: bool = False) -> Ancestor:
        """The entry for an input.

        Args:
            checkpoint: The input.
            role: What it is used as.
            full: Read all of it, so that `trace --verify` can later check every byte. Outputs of this package
                carry their full fingerprint already.
        """
        lineage = checkpoint.lineage
        content = lineage.content if lineage else None
        if full:
            content = checkpoint.fingerprint(full=True)
        return cls(role, checkpoint.name, checkpoint.fingerprint(), lineage, content)


@dataclass(frozen=True)
class Lineage:
    """How one checkpoint came to be.

    Attributes:
        method: The method's id: "ties", "train", ...
        parameters: Its options as JSON values.
        seed: The seed; None where nothing is random.
        inputs: The checkpoints it was made from, in the order used.
        versions: Package name -> version.
        content: The checkpoint's own full fingerprint; the writer fills it in.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    inputs: tuple[Ancestor, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    content: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The lineage as plain JSON values."""
        return {
            "format": FORMAT,
            "method": self.method,
            "parameters": self.parameters,
            "seed": self.seed,
            "inputs": [
                {
                    "role": ancestor.role,
                    "name": ancestor.name,
                    "fingerprint": ancestor.fingerprint,
                    "content": ancestor.content,
                    "lineage": ancestor.lineage.to_json() if ancestor.lineage else None,
                }
                for ancestor in self.inputs
            ],
            "versions": self.versions,
            "content": self.content,
        }

    def to_bytes(self) -> bytes:
        """The bytes of `weightsmith.json`: equal lineages give equal bytes."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8") + b"\n"

    @classmethod
    def from_json(cls, value: Any, source: str | Path = LINEAGE_FILE) -> Lineage:
        """Read back what `to_json` gave.

        Raises:
            CheckpointError: a key is missing or of the wrong kind; names `source`.
        """
        try:
            if value["format"] != FORMAT:
                raise CheckpointError(
                    f"{source}: format {value['format']!r}, this version of weightsmith reads {FORMAT}"
                )
            return cls(
                method=_typed(value["method"], str),
                parameters=_typed(value["parameters"], dict),
                seed=_typed(value["seed"], int, type(None)),
                inputs=tuple(
                    Ancestor(
                        role=_typed(entry["role"], str),
                        name=_typed(entry["name"], str),
                        fingerprint=_typed(entry["fingerprint"], str),
                        content=_typed(entry["content"], str, type(None)),
                        lineage=cls.from_json(entry["lineage"], source) if entry["lineage"] else None,
                    )
                    for entry in _typed(value["inputs"], list)
                ),
                versions=_typed(value["versions"], dict),
                content=_typed(value["content"], str, type(None)),
            )
        except (KeyError, TypeError, IndexError) as problem:
            raise CheckpointError(f"{source}: not a lineage of weightsmith: {problem!r}") from problem


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of the checkpoint in `folder`; None when it has none.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = folder / LINEAGE_FILE
    return Lineage.from_json(read_object(file), file) if file.is_file() else None


def _typed(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"found {type(value).__name__}, expected {kinds[0].__name__}")
    return value
