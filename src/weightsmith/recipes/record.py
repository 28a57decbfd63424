"""The record of a finished stage: `stage.json`, written last, and how it is told from a damaged or outdated
one.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import WeightsmithError
from weightsmith.recipes.fingerprint import digest, file_digest
from weightsmith.runs.atomic import read_json, write_json

RECORD = "stage.json"
STARTED = "started.json"
LOG = "log.txt"
# Below this size a checkpoint is hashed whole in a blink, so any flipped bit is noticed.
_SMALL = 256_000_000


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `stages/<stage>/stage.json` says.

    Attributes:
        stage: Its name.
        kind: Its kind, such as `train`.
        config: The config as it was carried out: defaults, derived values and searched options filled in.
        inputs: Content fingerprint of each model it read, by the page's word for it.
        fingerprint: Of config, inputs, data, seed and code.
        seed: The stage's seed.
        outputs: Name -> path inside the stage's folder.
        digests: Name -> content fingerprint of that output.
        seconds: Wall time, of the last attempt where there were several.
        peak_bytes: Peak resident memory of its process.
        predicted: What the plan said: `seconds`, `memory_bytes`, `disk_bytes`; empty when there was no plan.
    """

    stage: str
    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    fingerprint: str
    seed: int
    outputs: Mapping[str, str]
    digests: Mapping[str, str]
    seconds: float
    peak_bytes: int
    predicted: Mapping[str, float]


def read_record(folder: Path) -> Record | None:
    """The record in a stage's folder; None when there is none or it can't be understood."""
    try:
        values = read_json(folder / RECORD)
        return Record(**{field.name: values[field.name] for field in dataclasses.fields(Record)})
    except (WeightsmithError, KeyError, TypeError):
        return None  # never finished, or from another version: to be made again


def write_record(folder: Path, record: Record) -> None:
    """Declare the stage done."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def is_intact(folder: Path, record: Record) -> bool:
    """Whether every output is there with the content it had when the stage ended."""
    for name, path in record.outputs.items():
        try:
            if content_digest(folder / path) != record.digests[name]:
                return False
        except (WeightsmithError, OSError, KeyError):
            return False
    return True


def content_digest(path: Path) -> str:
    """Stands for the content of an output: of one file, of all files of a checkpoint folder, or of a folder
    of checkpoints.

    Raises:
        CheckpointError: the folder is no readable checkpoint.
        OSError: the path does not exist.
    """
    if not path.is_dir():
        return file_digest(path)
    if (path / "adapter_config.json").is_file():
        # An adapter can't be opened without its base, and is small.
        return digest({file.name: file_digest(file) for file in sorted(path.iterdir()) if file.is_file()})
    if not (path / "config.json").is_file() and (
        inner := [entry for entry in path.iterdir() if entry.is_dir()]
    ):
        return digest({folder.name: content_digest(folder) for folder in sorted(inner)})
    from weightsmith.checkpoints import Checkpoint

    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    with Checkpoint.open(path) as checkpoint:
        prints = {"weights": checkpoint.fingerprint(full=weights <= _SMALL)}
    for file in sorted(path.rglob("*")):
        # Tensors in a folder of ours are no part of the weights that were hashed above.
        if file.is_file() and (file.suffix != ".safetensors" or file.parent != path):
            prints[file.relative_to(path).as_posix()] = file_digest(file)
    return digest(prints)


def is_resumable(folder: Path, fingerprint: str) -> bool:
    """Whether a stage's folder holds the beginnings of the stage with this fingerprint."""
    if (folder / RECORD).exists() or not (folder / STARTED).is_file():
        return False
    try:
        return read_json(folder / STARTED) == {"fingerprint": fingerprint}
    except WeightsmithError:
        return False


def prepare(folder: Path, fingerprint: str) -> bool:
    """Make a stage's folder ready to work in; True when it holds the beginnings of the very same stage.

    Whatever another config, other inputs or a damaged result left there is deleted, the record first, so that
    a kill in between never leaves a record without its outputs.
    """
    same = is_resumable(folder, fingerprint)
    if not same:
        (folder / RECORD).unlink(missing_ok=True)
        _delete(folder, keep=[LOG])
        write_json(folder / STARTED, {"fingerprint": fingerprint})
    # Half-written files carry hidden names; their writers are dead, the stage's lock says so.
    _delete(folder, keep=[entry.name for entry in folder.iterdir() if not entry.name.startswith(".")])
    return same


def tidy(folder: Path, record: Record) -> None:
    """Delete what a finished stage no longer needs: its scratch space and its start mark."""
    kept = {Path(path).parts[0] for path in record.outputs.values()}
    _delete(folder, keep=[*kept, RECORD, LOG])


def _delete(folder: Path, keep: Any) -> None:
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if entry.name in keep:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
