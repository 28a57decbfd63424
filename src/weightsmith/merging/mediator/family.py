"""The base and its fine-tunes, opened together and checked, their tensors grouped into blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.folder import label, resolve
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging.api import plan_merge
from weightsmith.merging.parameter import Parameter
from weightsmith.merging.plan import Output

Experts = Mapping[str, str | Path] | Sequence[str | Path]

_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")


def block_of(name: str) -> str | None:
    """The block of a tensor, up to its number; None outside of the blocks.

    Example:
        >>> block_of("model.layers.3.mlp.experts.0.w1.weight"), block_of("lm_head.weight")
        ('model.layers.3', None)
    """
    found = _BLOCK.match(name)
    return found.group(0) if found else None


def named(experts: Experts) -> dict[str, str]:
    """Experts by task; those given as a list are called by their folders' names.

    Raises:
        InputError: fewer than two, a name twice, or one that can't be part of a file's name.
    """
    if isinstance(experts, Mapping):
        found = {str(task): str(folder) for task, folder in experts.items()}
    else:
        labels = [label(Path(folder)) for folder in experts]
        twice = [name for name in labels if labels.count(name) > 1]
        if twice:
            raise InputError(f"experts: two are called `{twice[0]}`; name them: {{task: folder}}")
        found = dict(zip(labels, map(str, experts), strict=True))
    if len(found) < 2:
        raise InputError(f"experts: Mediator needs at least 2 fine-tunes of one base, found {len(found)}")
    for task in found:
        check_task(task)
    return found


def check_task(task: str) -> None:
    """Refuse a task whose name can't be part of a file's (`InputError`)."""
    if not _TASK.fullmatch(task):
        raise InputError(f"experts: `{task}` is no name for a task; expected letters, digits and `_.-`")


class Family:
    """A base and K fine-tunes; a context manager that closes them.

    Args:
        base: Folder or hub id.
        experts: Folders, hub ids or adapters, by task or in a list.

    Attributes:
        base_source: The base, as it was given.
        sources: The fine-tunes by task, as they were given.
        tasks: Names of the fine-tunes, in order.
        outputs: Every tensor and where its values are, in the order of names.
        blocks: Name -> its tensors, in the order of their numbers.
        outside: Tensors outside the blocks.
        plan: The opened checkpoints.

    Raises:
        InputError: fewer than two fine-tunes, or names that don't do.
        CheckpointError: a model can't be read, or they are no family: names what differs.
    """

    def __init__(self, base: str | Path, experts: Experts) -> None:
        self.sources, self.base_source = named(experts), str(base)
        self.tasks = tuple(self.sources)
        for task, folder in self.sources.items():
            if _same(folder, base):
                raise CheckpointError(f"expert `{task}`: {folder} is the base itself; nothing to route to")
        self.plan = plan_merge(
            {
                "method": "task_arithmetic",
                "base": self.base_source,
                "models": list(self.sources.values()),
            }
        )
        self.outputs: dict[str, Output] = {output.spec.name: output for output in self.plan.outputs}
        self.blocks: dict[str, list[Output]] = {}
        self.outside: list[Output] = []
        for output in self.plan.outputs:
            block = block_of(output.spec.name)
            if block is None:
                self.outside.append(output)
            else:
                self.blocks.setdefault(block, []).append(output)
        if not self.blocks:
            self.plan.close()
            raise CheckpointError(f"{self.base.name}: no numbered blocks among its tensors; nothing to route")
        self.blocks = {name: self.blocks[name] for name in sorted(self.blocks, key=_natural)}

    @property
    def base(self) -> Checkpoint:
        """The base."""
        return self.plan.donor

    @property
    def experts(self) -> tuple[Checkpoint, ...]:
        """The fine-tunes, in the order of `tasks`."""
        first = next(output for output in self.plan.outputs if output.method is not None)
        return tuple(origin.checkpoint for origin in first.models)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content of base (under an empty name) and fine-tunes by task."""
        return {"": self.base.fingerprint()} | {
            task: checkpoint.fingerprint() for task, checkpoint in zip(self.tasks, self.experts, strict=True)
        }

    def parameter(self, output: Output) -> Parameter:
        """One tensor of base and fine-tunes."""
        return output.parameter(self.base.config)

    def close(self) -> None:
        """Close all checkpoints."""
        self.plan.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _same(one: str | Path, other: str | Path) -> bool:
    try:
        return resolve(one, offline=True)[0].resolve() == resolve(other, offline=True)[0].resolve()
    except CheckpointError:
        return False  # what is wrong with it is said when it is opened


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
