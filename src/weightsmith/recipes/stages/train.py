"""`train`: a model from random weights.

base: {train: {model: testbed/xs, data: [source, docs], steps: 500}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from weightsmith.recipes.stages.parts import PageData
from weightsmith.recipes.stages.training import TrainingStage
from weightsmith.training import TrainConfig
from weightsmith.training.parts import Objective
from weightsmith.training.zero_token.options import ZTTOptions


@dataclass(frozen=True, kw_only=True)
class Train(TrainingStage, TrainConfig):
    """Keys of the stage: those of `TrainConfig`, and the model whose architecture is trained."""

    model: str
    """`testbed/<size>`, or a stage, folder or hub id: its `config.json` and tokenizer, not its weights."""
    data: PageData
    """What to train on: test-bed tasks, files, hub data sets."""
    replay_data: PageData | None = None
    """What to replay where `replay` is set."""
    architecture: ZTTOptions | None = None  # pyrefly: ignore[bad-override]
    """What is made of the model's architecture: nothing (`plain`), cycles (`bc`, `htc`), or cycles with zero
    tokens (`ztt`)."""
    objective: Objective = None  # pyrefly: ignore[bad-override]
    """What the model reads: clean text (`ntp`), or text with a part of it masked (`meap`)."""

    seed: int | None = None
    """Decides initial weights, data order and all else that is random; by default the recipe's seed and the
    stage's name do. Stages with the same seed differ in nothing but their options."""

    kind: ClassVar[str] = "train"
    needs_weights: ClassVar[bool] = False
    settled: ClassVar[tuple[str, ...]] = ("adapter",)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Train."""
        from weightsmith.training import train

        train(self, *args, **kwargs)
