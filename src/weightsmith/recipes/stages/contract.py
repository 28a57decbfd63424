"""What a stage is: a validated config that names its models, tells its cost, and does its work in a folder.

A stage kind is one keyword-only dataclass (its keys are the keys of the page) with the methods of `Stage`.
The runner owns order, processes, reuse and records; a stage owns its folder while it runs, must be able to go
on from whatever an earlier, killed run of the same config left there, and must give the same result as an
undisturbed run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, ClassVar, Protocol

from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a page: where (keys from the top of the mapping) and what."""

    keys: Keys
    text: str


@dataclass(frozen=True)
class Reference:
    """A model that a stage reads: where the page says so (keys inside the stage) and what it says.

    Attributes:
        keys: Where.
        value: A stage, folder or hub id.
        output: Which output of a stage is read: its `checkpoint`, or the `states` that it keeps.
    """

    keys: Keys
    value: str
    output: str = "checkpoint"


@dataclass(frozen=True)
class Workspace:
    """Where a stage works.

    Attributes:
        folder: The stage's own folder, `stages/<name>` of the run.
        stage: Its name.
        seed: Its seed, derived from the recipe's and its name.
    """

    folder: Path
    stage: str
    seed: int

    @property
    def checkpoint(self) -> Path:
        """Where a stage that makes a model puts it."""
        return self.folder / "checkpoint"

    @property
    def work(self) -> Path:
        """Durable scratch space: kept when the stage is killed, deleted when it is done."""
        return self.folder / "work"


@dataclass(frozen=True)
class Done:
    """What a stage made.

    Attributes:
        outputs: Name -> path inside the stage's folder; a model is called `checkpoint`.
        config: The config as it was carried out, with every default and choice filled in.
    """

    outputs: Mapping[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Forecast:
    """What a stage will cost, and what it will read besides its models.

    Attributes:
        prediction: Memory, disk and time.
        model: A stand-in for the checkpoint to come: a folder with the same files, sizes and headers, its
            weights sparse
            zeros. None for a stage that makes no model.
        reads: Data and other things read, in the page's words.
        warnings: Lines the user should see before anything starts.
    """

    prediction: Prediction
    model: Path | None = None
    reads: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Stage(Protocol):
    """One stage's config object; the methods in the order in which the runner calls them."""

    kind: ClassVar[str]
    makes_model: ClassVar[bool]
    """Whether its output is a checkpoint that later stages may name."""
    needs_weights: ClassVar[bool]
    """Whether its models need weights; else `testbed/xs` or a folder with a config will do."""

    def references(self) -> Sequence[Reference]:
        """The models it reads, in the page's order."""
        ...

    def problems(self) -> Sequence[Problem]:
        """What the types alone can't tell: unknown data names, missing files, ranges; reads no weights."""
        ...

    def completed(self, earlier: Mapping[str, Stage]) -> Stage:
        """The same config with what it leaves to earlier stages filled in (a replay's mixture, `tasks:
        all`).
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What of the config decides the result, as JSON values."""
        ...

    def data_fingerprint(self) -> str:
        """Stands for the content of everything it reads besides its models; empty when there is nothing."""
        ...

    @property
    def needs_torch(self) -> bool:
        """Whether its process needs torch."""
        ...

    @property
    def needs_transformers(self) -> bool:
        """Whether it needs the packages of the extra `hf`."""
        ...

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost. `models` maps the references' values to folders, stand-ins for those that don't exist
        yet.
        """
        ...

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Do the work."""
        ...


@dataclass(frozen=True)
class Entry:
    """One stage of a page."""

    name: str
    config: Any
    line: int
    stages: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        """Its kind, such as `train`."""
        return self.config.kind


def references_in(models: Sequence[Any], key: str) -> Iterator[Reference]:
    """References of a list whose items are names or mappings with a `model` key."""
    for index, item in enumerate(models):
        if isinstance(item, Mapping):
            yield Reference((key, index, "model"), str(item["model"]))
        else:
            yield Reference((key, index), str(item))


def plain(value: Any) -> Any:
    """A config, or any part of one, as values that JSON has: dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
