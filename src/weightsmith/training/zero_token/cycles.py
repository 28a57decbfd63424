"""How many cycles a training step runs, where it is not always all of them.

`grow`: from one to all over the first fifth of the run, in equal steps. `sample`: a number drawn anew in
every step. Both follow from the seed and the step's number alone, so that all ranks, and a run that goes on
after a kill, take the same.
"""

from __future__ import annotations

import random
from typing import Any

from transformers import TrainerCallback

from weightsmith.errors import InputError
from weightsmith.runs.seeds import derive

GROWTH = 0.2
"""Share of the run over which cycles grow."""


def cycles_of_step(schedule: str, step: int, steps: int, num_cycles: int, seed: int) -> int:
    """Cycles of one training step.

    Args:
        schedule: `all`, `grow` or `sample`.
        step: Its number, from 0.
        steps: Of the run.
        num_cycles: All of them.
        seed: For `sample`.

    Example:
        >>> [cycles_of_step("grow", step, 20, 2, 0) for step in range(6)]
        [1, 1, 2, 2, 2, 2]
    """
    if schedule == "all":
        return num_cycles
    if schedule == "sample":
        return random.Random(derive(seed, "cycles", step)).randint(1, num_cycles)
    return min(num_cycles, 1 + int(num_cycles * step / max(1.0, GROWTH * steps)))


class CycleSchedule(TrainerCallback):
    """Set the cycles of every training step of a Zero-Token Transformer by its config's `training_cycles`.

    Args:
        model: The model in training, or one that holds it (an adapter).
        seed: For `sample`.

    Raises:
        InputError: there is no Zero-Token Transformer in the model.
    """

    def __init__(self, model: Any, seed: int = 0) -> None:
        inner = [module for module in model.modules() if hasattr(module, "cycles_now")]
        if not inner:
            raise InputError(f"CycleSchedule: {type(model).__name__} has no cycles; expected a ZTTModel")
        self._inner, self._seed = inner[0], seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the number."""
        config = self._inner.config
        self._inner.cycles_now = cycles_of_step(
            config.training_cycles, state.global_step, state.max_steps, config.num_cycles, self._seed
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Back to all."""
        self._inner.cycles_now = None
