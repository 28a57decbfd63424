"""Which blocks are averaged and which are routed: the rules, and the plan that people can read and change.

    mean + z std    d_l > mean(d) + z std(d), at least one block where any conflict is, at most `max_routed`
    n_routed        the n highest d
    threshold       d_l > threshold
    memory_budget   the most of the highest d that fit

Ties go to the lower block. Source: arXiv:2502.04411 averages layers of little conflict and routes those of
much; its threshold is not public.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from weightsmith.errors import InputError, nearest
from weightsmith.merging.mediator.options import MediatorConfig, parse_bytes
from weightsmith.merging.mediator.profile import Profile, conflict_profile, read_json
from weightsmith.runs.atomic import write_json

FORMAT = 1
Decision = Literal["averaged", "routed"]


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """What becomes of one block, and why.

    Attributes:
        block: Its name.
        decision: `averaged` or `routed`; may be changed by hand before the building.
        conflict: Its d.
        overlap: Share of its entries that were counted.
        low_support: Too few of them.
        bytes: What it takes.
    """

    block: str
    decision: Decision
    conflict: float
    overlap: float
    low_support: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MediatorPlan:
    """The split of a family's blocks.

    Attributes:
        base: Label of the base.
        tasks: Names of the fine-tunes.
        blocks: In order.
        bytes: Of the whole model, all experts included.
        fingerprints: Content of the base ("") and of each fine-tune.
        stale: The profile was made before experts came or went.
    """

    base: str
    tasks: tuple[str, ...]
    blocks: tuple[PlannedBlock, ...]
    bytes: int
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False

    @property
    def routed(self) -> tuple[str, ...]:
        """Names of the routed blocks."""
        return tuple(block.block for block in self.blocks if block.decision == "routed")

    def with_routed(self, routed: tuple[str, ...] | list[str]) -> MediatorPlan:
        """The same plan with exactly these blocks routed.

        Raises:
            InputError: no such block.
        """
        names = [block.block for block in self.blocks]
        for name in routed:
            if name not in names:
                raise InputError(f"plan: no block `{name}`{nearest(name, names)}")
        return dataclasses.replace(
            self,
            blocks=tuple(
                dataclasses.replace(block, decision="routed" if block.block in routed else "averaged")
                for block in self.blocks
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write it as JSON; change a block's `decision` there and give the file to `build_mediator`."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str | Path = "plan") -> MediatorPlan:
        """Read back what `to_json` gave.

        Raises:
            InputError: it is no plan; names `source` and what is wrong.
        """
        body = dict(value)
        if body.pop("format", None) != FORMAT:
            raise InputError(
                f"{source}: not a plan of Mediator (format {value.get('format')!r}, expected {FORMAT})"
            )
        try:
            blocks = tuple(PlannedBlock(**block) for block in body.pop("blocks"))
            tasks = tuple(body.pop("tasks"))
            plan = cls(tasks=tasks, blocks=blocks, **body)
        except (TypeError, KeyError) as problem:
            raise InputError(f"{source}: not a plan of Mediator: {problem}") from problem
        for block in blocks:
            if block.decision not in ("averaged", "routed"):
                raise InputError(
                    f"{source}: block {block.block}: decision `{block.decision}`, expected averaged or routed"
                )
        return plan

    @classmethod
    def load(cls, path: str | Path) -> MediatorPlan:
        """Read a plan's file. Raises as `from_json`."""
        return cls.from_json(read_json(path), path)


def split_blocks(profile: Profile, config: MediatorConfig) -> MediatorPlan:
    """Choose the routed blocks by the rule of `config`.

    Raises:
        InputError: more blocks asked for than there are, or a budget that not even the averaged model fits.
    """
    chosen = _chosen(profile, config)
    blocks = (*profile.blocks, *((profile.head,) if profile.head else ()))
    planned = tuple(
        PlannedBlock(
            block=block.name,
            decision="routed" if block.name in chosen or block is profile.head else "averaged",
            conflict=block.conflict,
            overlap=block.overlap,
            low_support=block.low_support,
            bytes=block.routed_bytes
            if block.name in chosen or block is profile.head
            else block.averaged_bytes,
        )
        for block in blocks
    )
    return MediatorPlan(
        base=profile.base,
        tasks=profile.tasks,
        blocks=planned,
        bytes=planned_bytes(profile, chosen),
        fingerprints=profile.fingerprints,
    )


def plan_mediator(
    base: str | Path, experts: Any, config: MediatorConfig | None = None, **options: Any
) -> MediatorPlan:
    """Profile a family and split its blocks; arguments and errors as `conflict_profile` and
    `split_blocks`.
    """
    config = config or MediatorConfig()
    return split_blocks(conflict_profile(base, experts, config, **options), config)


def planned_bytes(profile: Profile, routed: tuple[str, ...]) -> int:
    """Bytes of the model with these blocks routed."""
    return profile.averaged_bytes + sum(
        block.routed_bytes - block.averaged_bytes for block in profile.blocks if block.name in routed
    )


def by_conflict(profile: Profile) -> list[str]:
    """Names of the blocks, the highest conflict first; the lower block among equals."""
    order = sorted(range(len(profile.blocks)), key=lambda at: (-profile.blocks[at].conflict, at))
    return [profile.blocks[at].name for at in order]


def _chosen(profile: Profile, config: MediatorConfig) -> tuple[str, ...]:
    ranked, count = by_conflict(profile), len(profile.blocks)
    conflicts = [block.conflict for block in profile.blocks]
    if config.n_routed is not None:
        if config.n_routed > count:
            raise InputError(
                f"n_routed: {config.n_routed} blocks asked for, the model has {count}; expected 0..{count}"
            )
        return tuple(ranked[: config.n_routed])
    if config.threshold is not None:
        return tuple(block.name for block in profile.blocks if block.conflict > config.threshold)
    if config.memory_budget is not None:
        return _fitting(profile, ranked, parse_bytes(config.memory_budget))
    most = config.max_routed if config.max_routed is not None else max(1, count // 2)
    if most > count:
        raise InputError(f"max_routed: {most} blocks asked for, the model has {count}; expected 0..{count}")
    # One rounding error above the mean is not above it.
    level = statistics.fmean(conflicts) + config.z * statistics.pstdev(conflicts) + 1e-12
    above = sum(conflict > level for conflict in conflicts)
    if not above and max(conflicts) > 0:
        above = 1
    return tuple(ranked[: min(above, most)])


def _fitting(profile: Profile, ranked: list[str], budget: int) -> tuple[str, ...]:
    least = planned_bytes(profile, ())
    if least > budget:
        raise InputError(f"memory_budget: {budget} bytes, the averaged model alone takes {least}: the least")
    fitting = [n for n in range(len(ranked) + 1) if planned_bytes(profile, tuple(ranked[:n])) <= budget]
    return tuple(ranked[: max(fitting)])
