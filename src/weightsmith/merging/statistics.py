"""Folders of statistics, as `weightsmith stats` writes them: opened, checked against the model they are of.

statistics.json     which model (its fingerprint), which data, how many examples and tokens
model.safetensors   `fisher.<parameter>`: diagonal Fisher information, of the parameter's shape
                    `gram.<parameter>`: mean of x x^T over the inputs x of a linear layer (inputs, inputs)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.folder import read_object
from weightsmith.errors import CheckpointError
from weightsmith.merging.aligned import AlignedCheckpoint
from weightsmith.merging.compatibility import NOTHING_WRITTEN
from weightsmith.merging.matrices import inputs_first
from weightsmith.merging.parameter import Statistic

if TYPE_CHECKING:
    from weightsmith.merging.sources import Origin

FACTS_FILE = "statistics.json"
FORMAT = 1

Kind = Literal["fisher", "gram"]
KINDS: tuple[Kind, ...] = ("fisher", "gram")


@dataclass(frozen=True)
class Statistics:
    """One opened folder.

    Attributes:
        source: The folder as the page names it.
        checkpoint: Its tensors.
        facts: Its `statistics.json`.
    """

    source: str
    checkpoint: Checkpoint
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, source: str, model: Checkpoint) -> Statistics:
        """Open the folder that holds what was measured of `model`.

        Raises:
            CheckpointError: it is no such folder, or was measured of other weights.
        """
        facts_file = Path(source).expanduser() / FACTS_FILE
        if not facts_file.is_file():
            raise CheckpointError(
                f"{source}: has no {FACTS_FILE}; expected a folder made by `weightsmith stats {model.name} "
                f"{source} --data ...`. {NOTHING_WRITTEN}"
            )
        facts = read_object(facts_file)
        if facts.get("format") != FORMAT:
            raise CheckpointError(
                f"{facts_file}: format {facts.get('format')!r}, this version of weightsmith reads {FORMAT}"
            )
        if not isinstance(facts.get("kinds"), list):
            raise CheckpointError(f"{facts_file}: kinds: {facts.get('kinds')!r}, expected a list of names")
        if facts.get("fingerprint") != model.fingerprint():
            raise CheckpointError(
                f"{source}: was measured of {facts.get('model')} with other weights than those of "
                f"{model.name}; make it again by `weightsmith stats`. {NOTHING_WRITTEN}"
            )
        return cls(source, Checkpoint.open(facts_file.parent), facts)

    def close(self) -> None:
        """Close its files."""
        self.checkpoint.close()

    def aligned(self, model: Checkpoint) -> Statistics:
        """The same for a model whose token rows are in another order.

        Fisher information moves with its rows, and that of a token the model lacks is 0: the model has no
        say in it. Gram matrices are over inputs of layers, which no order of tokens changes.
        """
        assert isinstance(model, AlignedCheckpoint)
        return dataclasses.replace(self, checkpoint=model.like(self.checkpoint, "fisher."))

    def find(self, kind: Kind, name: str) -> Statistic | None:
        """What was measured of one parameter; None where nothing was."""
        info = self.checkpoint.tensors.get(f"{kind}.{name}")
        if info is None:
            return None
        return Statistic(tuple(info.shape), functools.partial(self.checkpoint.read, info.name))


def measured_of(
    kind: Kind, models: Sequence[Origin], statistics: Mapping[int, Statistics]
) -> tuple[Statistic, ...]:
    """What was measured of one tensor in each model.

    Args:
        kind: "fisher", which every tensor must have; or "gram", which tensors have that are linear layers.
        models: Where the tensor is in each model.
        statistics: By the `id` of the model's checkpoint.

    Raises:
        CheckpointError: missing in a model, or of another shape; names folder and tensor.
    """
    folders = [statistics[id(origin.checkpoint)] for origin in models]
    found = [folder.find(kind, origin.name) for folder, origin in zip(folders, models, strict=True)]
    for folder in folders:
        if kind not in folder.facts["kinds"]:
            raise CheckpointError(
                f"{folder.source}: holds no {kind} statistics; make them by `weightsmith stats ... --kind "
                f"{kind}`. {NOTHING_WRITTEN}"
            )
    if kind == "gram" and not any(found):
        return ()
    for folder, origin, statistic in zip(folders, models, found, strict=True):
        if statistic is None:
            raise CheckpointError(
                f"{folder.source}: holds no {kind} statistics of `{origin.name}`. {NOTHING_WRITTEN}"
            )
        shape = wanted = tuple(origin.info.shape)
        if kind == "gram":
            side = shape[0] if inputs_first(origin.name, shape, origin.checkpoint.config) else shape[-1]
            wanted = (side, side)
        if statistic.shape != wanted:
            raise CheckpointError(
                f"{folder.source}: {kind} statistics of `{origin.name}` are {list(statistic.shape)}, for the "
                f"tensor of {list(shape)} they should be {list(wanted)}. {NOTHING_WRITTEN}"
            )
    return tuple(statistic for statistic in found if statistic is not None)
