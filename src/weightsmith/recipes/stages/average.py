"""`average`: the uniform mean of several states, the same sum as `merge` with `linear`.

mean: {average: {models: [first, second, runs/old/checkpoint-400]}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.errors import InputError
from weightsmith.merging import average, parse_merge, plan_merge
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.stages.merge_costs import predict_merge
from weightsmith.recipes.standin import write_standin
from weightsmith.runs.progress import Progress
from weightsmith.tensors.floats import parse_dtype


@dataclass(frozen=True, kw_only=True)
class Average:
    """Keys of the stage."""

    models: tuple[str, ...]
    """Stages, folders or hub ids; two or more."""
    dtype: str | None = None
    """Of the output; that of the first model by default."""

    kind: ClassVar[str] = "average"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = False
    needs_transformers: ClassVar[bool] = False

    def references(self) -> Sequence[Reference]:
        """See `contract.Stage`."""
        return [Reference(("models", index), model) for index, model in enumerate(self.models)]

    def problems(self) -> Sequence[Problem]:
        """See `contract.Stage`."""
        found = []
        if len(self.models) < 2:
            found.append(Problem(("models",), f"expected two models or more, found {len(self.models)}"))
        if self.dtype is not None:
            try:
                parse_dtype(self.dtype)
            except InputError as wrong:
                found.append(Problem(("dtype",), str(wrong)))
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Average:
        """See `contract.Stage`."""
        return self

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        return plain(self)

    def data_fingerprint(self) -> str:
        """It reads its models only."""
        return ""

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """See `contract.Stage`."""
        page: dict[str, Any] = {"method": "linear", "models": self._folders(models)}
        if self.dtype is not None:
            page["dtype"] = self.dtype
        with plan_merge(parse_merge(page)) as plan:
            standin = write_standin(
                workspace.checkpoint, plan.specs, side_files=plan.side_files, lineage=plan.lineage
            )
            return Forecast(
                prediction=predict_merge(plan, diagnosed=False), model=standin, warnings=plan.warnings
            )

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """See `contract.Stage`."""
        average(
            self._folders(models), workspace.checkpoint, dtype=self.dtype, progress=progress, overwrite=True
        )
        return Done({"checkpoint": "checkpoint"}, plain(self))

    def _folders(self, models: Mapping[str, Path]) -> list[str]:
        return [str(models[name]) for name in self.models]
