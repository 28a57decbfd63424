"""The conflict profile of a family of fine-tunes: one streaming pass over base and fine-tunes, no model
built.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError
from weightsmith.merging.mediator.conflict import LOW_SUPPORT, Counts, measure
from weightsmith.merging.mediator.family import Experts, Family
from weightsmith.merging.mediator.options import MediatorConfig
from weightsmith.merging.mediator.sparse import choose_form, kept
from weightsmith.merging.parameter import TILE_ELEMENTS, Parameter
from weightsmith.merging.plan import Output
from weightsmith.merging.workers import Processes, Tell
from weightsmith.runs.environment import cores
from weightsmith.runs.progress import SILENT, Progress

HEAD = "lm_head"
"""What the output projection is called as a block."""


@dataclass(frozen=True, kw_only=True)
class BlockConflict:
    """One block of the profile.

    Attributes:
        name: Common part of its tensors' names.
        conflict: d, 0 (the fine-tunes agree) to 1 (opposite); 0.5 is what unrelated changes have.
        overlap: Share of the entries that an average pair of fine-tunes both change noticeably.
        low_support: Fewer than one entry in 10,000 was counted: d is noise.
        vectors_only: No matrix of the block changed; d was measured on its vectors.
        averaged_bytes: What the block takes when it is averaged.
        routed_bytes: What it takes when it is routed.
    """

    name: str
    conflict: float
    overlap: float
    low_support: bool
    vectors_only: bool
    averaged_bytes: int
    routed_bytes: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much the fine-tunes of a base disagree, block by block.

    Attributes:
        base: Label of the base.
        tasks: Names of the fine-tunes.
        blocks: In the order of their numbers.
        outside_bytes: Bytes of what lies outside of the blocks.
        head: The output projection, where `route_head` asks for it.
        fingerprints: Content of the base ("") and of each fine-tune.
    """

    base: str
    tasks: tuple[str, ...]
    blocks: tuple[BlockConflict, ...]
    outside_bytes: int
    head: BlockConflict | None
    fingerprints: dict[str, str]

    @property
    def averaged_bytes(self) -> int:
        """The model with every block averaged."""
        extra = self.head.routed_bytes - self.head.averaged_bytes if self.head else 0
        return self.outside_bytes + extra + sum(block.averaged_bytes for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def conflict_profile(
    base: str | Path,
    experts: Experts,
    config: MediatorConfig | None = None,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Profile:
    """Measure each block's conflict between fine-tunes of one base; nothing is written.

    Args:
        base: Folder or hub id of the model that the experts were tuned from.
        experts: Folders, hub ids or LoRA adapters: a mapping from task to model, or a list.
        config: How conflict is measured.
        threads: Worker processes; one a core by default. The numbers do not depend on it.
        progress: Told the elements measured.

    Raises:
        InputError: fewer than two experts.
        CheckpointError: a model can't be read, they don't fit each other, or a weight is NaN or infinite.
    """
    with Family(base, experts) as family:
        return profile_family(family, config or MediatorConfig(), threads=threads, progress=progress)


def profile_family(
    family: Family, config: MediatorConfig, *, threads: int | None = None, progress: Progress = SILENT
) -> Profile:
    """The profile of an opened family."""
    head = head_of(family) if config.route_head else None
    measured = [
        output
        for outputs in (*family.blocks.values(), [head] if head else [])
        for output in outputs
        if output.method is not None
    ]
    parameters = [family.parameter(output) for output in measured]
    progress.start("conflict", float(sum(parameter.numel for parameter in parameters)), "elements")

    def one(parameter: Parameter, tell: Tell) -> Counts:
        counts = measure(parameter, config)
        tell(float(parameter.numel))
        return counts

    workers = Processes(threads or cores(), TILE_ELEMENTS)
    found = workers.each(one, parameters, lambda parameter: parameter, progress.advance)
    progress.done()
    counts = {parameter.name: part for parameter, part in zip(parameters, found, strict=True)}
    return Profile(
        base=family.base.name,
        tasks=family.tasks,
        blocks=tuple(
            _block(name, outputs, counts, len(family.tasks), config)
            for name, outputs in family.blocks.items()
        ),
        outside_bytes=sum(output.spec.nbytes for output in family.outside),
        head=_block(HEAD, [head], counts, len(family.tasks), config) if head else None,
        fingerprints=family.fingerprints,
    )


def head_of(family: Family) -> Output:
    """The tensor of the output projection, which may be the embedding that it is tied to.

    Raises:
        InputError: the model has none that can be told.
    """
    aliases = [alias for alias in family.base.tied if alias in HEAD_NAMES]
    stored = [family.base.tied[alias] for alias in aliases]
    for name in (*HEAD_NAMES, *stored):
        if name in family.outputs:
            return family.outputs[name]
    raise InputError(f"route_head: {family.base.name} has no output projection ({', '.join(HEAD_NAMES)})")


HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")


def routed_bytes(outputs: list[Output], tasks: int, config: MediatorConfig) -> int:
    """Bytes of a routed block: its dense part and the difference of each expert."""
    total = 0
    for output in outputs:
        total += output.spec.nbytes
        if output.method is not None:
            count = kept(output.spec.numel, config.expert_density)
            total += tasks * choose_form(output.spec.shape, output.spec.dtype, count, config).nbytes
    return total


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: there is none.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{path}: {(problem.strerror or str(problem)).lower()}") from problem
    except ValueError as problem:
        raise InputError(f"{path}: not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def _block(
    name: str, outputs: list[Output], counts: dict[str, Counts], tasks: int, config: MediatorConfig
) -> BlockConflict:
    matrices, vectors = Counts(), Counts()
    for output in outputs:
        if output.spec.name in counts:
            kind = matrices if len(output.spec.shape) >= 2 else vectors
            kind += counts[output.spec.name]
    vectors_only = matrices.shared == 0 and vectors.shared > 0
    used = vectors if vectors_only else matrices
    return BlockConflict(
        name=name,
        conflict=used.conflict(config),
        overlap=used.overlap,
        low_support=used.overlap < LOW_SUPPORT,
        vectors_only=vectors_only,
        averaged_bytes=sum(output.spec.nbytes for output in outputs),
        routed_bytes=routed_bytes(outputs, tasks, config),
    )
