"""`finetune`: a trained model trained further.

code: {finetune: {model: base, data: source, replay: 0.25}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.checkpoints.folder import MASKS_FILE
from weightsmith.recipes.stages.contract import Forecast, Workspace
from weightsmith.recipes.stages.parts import PageData
from weightsmith.recipes.stages.training import TrainingStage
from weightsmith.training import FinetuneConfig
from weightsmith.training.parts import Objective

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingStage, FinetuneConfig):
    """Keys of the stage: those of `FinetuneConfig`, and the model it starts from."""

    model: str
    """A stage, folder or hub id."""
    data: PageData
    """What to train on: test-bed tasks, files, hub data sets."""
    replay_data: PageData | None = None
    """What to replay; by default what `model` was trained on."""
    objective: Objective = None  # pyrefly: ignore[bad-override]
    """What the model reads: clean text (`ntp`), or text with a part of it masked (`meap`)."""

    seed: int | None = None
    """Decides initial weights, data order and all else that is random; by default the recipe's seed and the
    stage's name do. Stages with the same seed differ in nothing but their options."""
    keep_zeros: bool = True
    """Whether a pruned model stays pruned: what its masks drop stays 0, and they lie beside the result. An
    adapter is masked after it was merged."""

    kind: ClassVar[str] = "finetune"
    needs_weights: ClassVar[bool] = True
    settled: ClassVar[tuple[str, ...]] = ("architecture",)

    def carried(self, model: Path) -> Mapping[str, Path]:
        """The masks of a pruned model."""
        masks = model / MASKS_FILE
        return {MASKS_FILE: masks} if self.keep_zeros and masks.is_file() else {}

    def callbacks(self, model: Path | None, network: Any) -> list[TrainerCallback]:
        """What keeps the zeros of a pruned model."""
        if model is None or not self.carried(model):
            return []
        from weightsmith.training.zeros import KeepZeros

        return [KeepZeros(network, model)]

    def forecast(self: Any, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Cost of the training, its checkpoint to come, and what becomes of a pruned model's zeros."""
        found = super().forecast(models, workspace)
        if not (models[self.model] / MASKS_FILE).is_file():
            return found
        if not self.keep_zeros:
            note = f"{self.model} is pruned, and `keep_zeros: false` lets its zeros go"
        elif self.adapter is not None:
            note = f"{self.model} is pruned: the merged adapter is masked again, which costs some of it"
        else:
            return found
        return replace(found, warnings=(*found.warnings, note))

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Train."""
        from weightsmith.training import finetune

        finetune(self, *args, **kwargs)
