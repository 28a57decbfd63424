"""`finetune`: a trained model trained further.

code: {finetune: {model: base, data: source, replay: 0.25}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from weightsmith.recipes.stages.parts import PageData
from weightsmith.recipes.stages.training import TrainingStage
from weightsmith.training import FinetuneConfig
from weightsmith.training.parts import Objective


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

    kind: ClassVar[str] = "finetune"
    needs_weights: ClassVar[bool] = True
    settled: ClassVar[tuple[str, ...]] = ("architecture",)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Train."""
        from weightsmith.training import finetune

        finetune(self, *args, **kwargs)
