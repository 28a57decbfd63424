"""What happens beside a training step: metrics, progress, layers left out, states kept."""

from __future__ import annotations

import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from weightsmith.errors import InputError
from weightsmith.runs.atomic import append_line, read_lines, write_text
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.parts import taken_steps
from weightsmith.training.planning import TrainPlan
from weightsmith.training.states import state_folder, state_lineage, state_specs

# What the Trainer and the parts call it -> what a line of metrics calls it.
_FROM_PARTS = {
    "grad_norm": "grad_norm",
    "adagc/clip_rate": "clipped",
    "adagc/min_coef": "smallest_factor",
    "adagc/nonfinite": "nonfinite",
    "sam/sharpness": "sharpness",
}


class Metrics(TrainerCallback):
    """Write `metrics.jsonl`, tell the progress, and stop a run whose loss is no number.

    Each line has "step", "loss" (its mean since the line before), "learning_rate", "grad_norm" (of the last
    step, before clipping), "tokens" (of all windows so far) and "seconds" (of training so far, those before a
    kill included); with AdaGC the share of norms "clipped" since the line before, the "smallest_factor" and
    the number of "nonfinite" ones; with two-pass steps the mean "sharpness" since the line before.

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
            **{name: _short(logs[key]) for key, name in _FROM_PARTS.items() if key in logs},
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


class KeepStates(TrainerCallback):
    """Keep states of a run as whole checkpoints, for an average that is made later.

    Args:
        planned: The run, with `average.keep`.
        network: The model in training.
        folder: Gets one folder `step-<n>` for each state; of more than `num_candidates` the latest stay.
    """

    def __init__(self, planned: TrainPlan, network: Any, folder: Path) -> None:
        assert planned.config.average is not None
        self._planned, self._network, self._folder = planned, network, folder
        self._options, steps = planned.config.average.options, planned.config.steps
        self._steps = list(taken_steps(self._options, steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state when its turn has come; a resumed run writes the same bytes again."""
        if state.global_step not in self._steps:
            return
        from weightsmith.training.weights import write_model

        planned, step = self._planned, state.global_step
        write_model(
            self._network,
            state_folder(self._folder, step),
            state_specs(planned.specs),
            side_files=planned.side_files,
            lineage=state_lineage(planned.lineage, step),
            source=planned.model if planned.from_weights else None,
            overwrite=True,
        )
        gone = self._steps.index(step) - self._options.num_candidates
        if gone >= 0:
            shutil.rmtree(state_folder(self._folder, self._steps[gone]), ignore_errors=True)


def _identity(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def _short(value: Any) -> float | None:
    """Six digits, and null for what JSON can't say."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _json(line: dict[str, Any]) -> str:
    import json

    return json.dumps(line, ensure_ascii=False)
