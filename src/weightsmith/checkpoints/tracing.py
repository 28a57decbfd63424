"""The family tree of a checkpoint: what it was made from, and which ancestors can be found and verified.

An ancestor is found when a folder has its quick fingerprint; names only decide where to look first. Looked
through are the checkpoint's siblings, the stages of its run, `runs/` under the working folder, folders
given by the caller, and the local hub cache for ancestors that came from a hub. With `verify`, every byte
of a found ancestor is compared with its full fingerprint where the lineage knows it: always for checkpoints
this package wrote, for others when they were taken in with `Ancestor.of(..., full=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weightsmith.checkpoints import folder as folders
from weightsmith.checkpoints.lineage import Ancestor, Lineage
from weightsmith.checkpoints.reader import Checkpoint
from weightsmith.errors import CheckpointError, SystemFault

_DEPTH = 4
"""How far below a given folder checkpoints are looked for: runs/<recipe>/stages/<stage>/checkpoint."""

Proof = Literal["full", "quick", ""]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One checkpoint of the tree.

    Attributes:
        role: What its child used it as; "checkpoint" for the root.
        name: Its label.
        method: What made it; None when it has no lineage (an original).
        parameters: The method's options.
        seed: The method's seed.
        versions: Package versions.
        fingerprint: Its recorded quick fingerprint; of the root, the present one.
        found: Where it lies; None when it wasn't found.
        verified: "full" when every byte was checked, "quick" when samples were, "" when its content is not
            what was recorded or nothing was checked.
        note: What a reader should know, one sentence, or "".
        inputs: What it was made from.
    """

    role: str
    name: str
    method: str | None
    parameters: dict[str, Any]
    seed: int | None
    versions: dict[str, str]
    fingerprint: str
    found: Path | None
    verified: Proof
    note: str
    inputs: tuple[Trace, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "role": self.role,
            "name": self.name,
            "method": self.method,
            "parameters": self.parameters,
            "seed": self.seed,
            "versions": self.versions,
            "fingerprint": self.fingerprint,
            "found": str(self.found) if self.found else None,
            "verified": self.verified,
            "note": self.note,
            "inputs": [child.to_json() for child in self.inputs],
        }


def trace(path: str | Path, search: Sequence[str | Path] = (), verify: bool = False) -> Trace:
    """The family tree of the checkpoint in `path`.

    Args:
        path: A checkpoint folder.
        search: More folders to look for ancestors in, four levels deep.
        verify: Compare every byte of what is found with its full fingerprint.

    Raises:
        CheckpointError: `path` is not a sound checkpoint, or its lineage is damaged.
    """
    with Checkpoint.open(path, offline=True) as checkpoint:
        lineage = checkpoint.lineage
        proof, note = _check_root(checkpoint, lineage, verify)
        finder = _Finder(_places(checkpoint.path, search), verify)
        return _node(
            role="checkpoint",
            name=checkpoint.name,
            lineage=lineage,
            fingerprint=checkpoint.fingerprint(),
            found=checkpoint.path,
            verified=proof,
            note=note,
            finder=finder,
        )


def _check_root(checkpoint: Checkpoint, lineage: Lineage | None, verify: bool) -> tuple[Proof, str]:
    if lineage is None:
        return "", f"no {folders.LINEAGE_FILE}: not made by weightsmith, so its origin is unknown"
    if not verify or lineage.content is None:
        return "", ""
    if checkpoint.fingerprint(full=True) == lineage.content:
        return "full", ""
    return "", "its content has changed since it was written"


def _node(
    *,
    role: str,
    name: str,
    lineage: Lineage | None,
    fingerprint: str,
    found: Path | None,
    verified: Proof,
    note: str,
    finder: _Finder,
) -> Trace:
    return Trace(
        role=role,
        name=name,
        method=lineage.method if lineage else None,
        parameters=lineage.parameters if lineage else {},
        seed=lineage.seed if lineage else None,
        versions=lineage.versions if lineage else {},
        fingerprint=fingerprint,
        found=found,
        verified=verified,
        note=note,
        inputs=tuple(_ancestor(entry, finder) for entry in lineage.inputs) if lineage else (),
    )


def _ancestor(entry: Ancestor, finder: _Finder) -> Trace:
    found, verified, note = finder.find(entry)
    return _node(
        role=entry.role,
        name=entry.name,
        lineage=entry.lineage,
        fingerprint=entry.fingerprint,
        found=found,
        verified=verified,
        note=note,
        finder=finder,
    )


@dataclass
class _Finder:
    """Looks for ancestors by fingerprint; each folder is fingerprinted once."""

    places: list[Path]
    verify: bool
    quick: dict[Path, str] = field(default_factory=dict)
    answers: dict[tuple[str, str | None], tuple[Path | None, Proof, str]] = field(default_factory=dict)

    def find(self, entry: Ancestor) -> tuple[Path | None, Proof, str]:
        """Where an ancestor lies, how far it was verified, and a note."""
        key = (entry.fingerprint, entry.content)
        if key not in self.answers:
            self.answers[key] = self._find(entry)
        return self.answers[key]

    def _find(self, entry: Ancestor) -> tuple[Path | None, Proof, str]:
        places = [*_cached(entry.name), *self.places]
        namesakes = [place for place in places if folders.label(place) == entry.name]
        for place in [*namesakes, *places]:
            if self._quick(place) == entry.fingerprint:
                return self._proof(place, entry)
        for place in namesakes:
            what = "and other content" if self._quick(place) else "but can't be read"
            return None, "", f"{place} has its name {what}"
        return None, "", "not found"

    def _proof(self, place: Path, entry: Ancestor) -> tuple[Path | None, Proof, str]:
        if not self.verify:
            return place, "quick", ""
        if entry.content is None:
            return place, "quick", "its full fingerprint was not recorded, so only samples were compared"
        with Checkpoint.open(place, offline=True) as checkpoint:
            if checkpoint.fingerprint(full=True) == entry.content:
                return place, "full", ""
        return place, "", "its content has changed since it was used"

    def _quick(self, place: Path) -> str:
        if place not in self.quick:
            try:
                with Checkpoint.open(place, offline=True) as checkpoint:
                    self.quick[place] = checkpoint.fingerprint()
            except (CheckpointError, SystemFault):
                self.quick[place] = ""  # damaged or unreadable: not the one that was recorded
        return self.quick[place]


def _places(path: Path, search: Iterable[str | Path]) -> list[Path]:
    """Checkpoint folders to look at, nearest first, each once; the root itself is none of them."""
    here = Path(os.path.abspath(path))
    found: dict[Path, None] = {}
    for top, depth in [
        (here.parent, 1),
        *([(here.parent.parent, 2)] if here.name == "checkpoint" else []),
        *((Path(folder), _DEPTH) for folder in search),
        (Path("runs"), _DEPTH),
    ]:
        found.update(dict.fromkeys(_checkpoints(Path(os.path.abspath(top)), depth)))
    found.pop(here, None)
    return list(found)


def _checkpoints(top: Path, depth: int) -> Iterator[Path]:
    if not top.is_dir():
        return
    if folders.holds_checkpoint(top):
        yield top
    if depth == 0:
        return
    try:
        below = sorted(entry.path for entry in os.scandir(top) if entry.is_dir() and entry.name[0] != ".")
    except PermissionError:
        return
    for folder in below:
        yield from _checkpoints(Path(folder), depth - 1)


def _cached(name: str) -> list[Path]:
    """Snapshots of hub model `name` in the local cache."""
    repo = name.partition("@")[0]
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = cache / ("models--" + repo.replace("/", "--")) / "snapshots"
    return [folder for folder in sorted(snapshots.glob("*")) if folders.holds_checkpoint(folder)]
