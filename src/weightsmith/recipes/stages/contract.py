"""What a stage is: a validated config that names its models, tells its cost, and does its work in a folder.

A stage kind is one keyword-only dataclass (its keys are the keys of the page) with the methods of `Stage`.
The runner owns order, processes, reuse and records; a stage owns its folder while it runs, must be able to go
on from whatever an earlier, killed run of the same config left there, and must give the same result as an
undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Reference:
    """A model that a stage reads: where the page says so (keys inside the stage) and what it says."""

    keys: Keys
    value: str


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


Problems = Callable[[Keys, str], None]
"""Notes what is wrong with a stage, at its keys."""


class Stage(Protocol):
    """One stage's config object; the methods in the order in which the runner calls them."""

    kind: ClassVar[str]
    makes_model: ClassVar[bool]
    """Whether its output is a checkpoint that later stages may name."""
    takes_testbed: ClassVar[bool]
    """Whether it starts from a model without weights (`testbed/xs`)."""

    def references(self) -> Sequence[Reference]:
        """The models it reads, in the page's order."""
        ...

    def check(self, problem: Problems) -> None:
        """Report what the types alone can't tell (unknown data names, missing files); reads no weights."""
        ...

    def completed(self, earlier: Mapping[str, Stage]) -> Stage:
        """The same config with what it leaves to earlier stages filled in (a replay's mixture, `tasks:
        all`).
        """
        ...

    def data_fingerprint(self) -> str:
        """Stands for the content of everything it reads besides its models; empty when there is nothing."""
        ...

    @property
    def needs_torch(self) -> bool:
        """Whether its process needs torch and transformers."""
        ...

    def effort(self) -> float:
        """Rough cost, to decide which of several stages that could start should start first."""
        ...

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost. `models` maps the references' values to folders, stand-ins for those that don't exist
        yet.
        """
        ...

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> dict[str, str]:
        """Do the work; returns the outputs as name -> path inside the stage's folder."""
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
