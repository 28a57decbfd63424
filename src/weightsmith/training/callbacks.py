"""What happens beside a training step: metrics, progress, layers left out."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from weightsmith.errors import InputError
from weightsmith.runs.atomic import append_line, read_lines, write_text
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive


class Metrics(TrainerCallback):
    """Write `metrics.jsonl`, tell the progress, and stop a run whose loss is no number.

    Each line is {"step", "loss", "learning_rate", "tokens", "seconds"}: the mean loss since the line before,
    tokens of all windows so far, seconds of training so far, those before a kill included.

    Args:
        path: The file.
        tokens_per_step: Tokens of one optimiser step.
        progress: Told about each step.
    """

    def __init__(self, path: Path, tokens_per_step: int, progress: Progress) -> None:
        self.path, self.tokens_per_step, self.progress = path, tokens_per_step, progress
        self.loss = math.nan
        self.seconds_before = 0.0
        self._started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that will be done again."""
        lines = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
        write_text(self.path, "".join(_json(line) + "\n" for line in lines))
        if lines:
            self.seconds_before, self.loss = lines[-1]["seconds"], lines[-1]["loss"]
        self._started = time.perf_counter()
        self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more. The last one is always logged, and so is one after which a checkpoint is saved: the
        mean since the last line is in no checkpoint, so a run that goes on from there has to begin a new one.
        """
        self.progress.advance(1)
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        if "loss" not in logs:
            return  # the summary at the end
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            raise InputError(
                f"step {state.global_step}: the loss is {self.loss}; lower learning_rate (now "
                f"{args.learning_rate:g}) or check the starting weights with `weightsmith inspect --norms`"
            )
        line = {
            "step": state.global_step,
            "loss": round(self.loss, 6),
            "learning_rate": float(logs["learning_rate"]),
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(self.seconds, 3),
        }
        append_line(self.path, line)


class LayerDrop(TrainerCallback):
    """Leave out each inner decoder layer with a fixed chance, anew in every step.

    First and last layer always run. Which layers a step leaves out depends on the seed and the step's number
    alone.

    Args:
        model: A model whose decoder layers are `base_model.layers`.
        chance: Chance of each inner layer to be left out.
        seed: Decides which.

    Raises:
        InputError: the model's layers can't be found, or there are none inside.
    """

    def __init__(self, model: Any, chance: float, seed: int) -> None:
        layers = getattr(model.base_model, "layers", None)
        if layers is None or len(layers) < 3:
            raise InputError(
                f"layer_drop: {type(model).__name__} has no decoder layers between a first and a last one "
                "that could be left out (expected `layers` of three or more)"
            )
        self._inner = list(layers)[1:-1]
        self._chance, self._seed = chance, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the layers of this step."""
        rng = random.Random(derive(self._seed, "layer drop", state.global_step))
        for layer in self._inner:
            layer.__dict__.pop("forward", None)
            if rng.random() < self._chance:
                layer.forward = _identity

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        for layer in self._inner:
            layer.__dict__.pop("forward", None)


def _identity(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def _json(line: dict[str, Any]) -> str:
    import json

    return json.dumps(line, ensure_ascii=False)
