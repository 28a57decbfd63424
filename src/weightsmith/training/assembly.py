"""From the keys `optimizer`, `clip`, `decay`, `sharpness`, `average`, `objective`, `adapter` to what a
Trainer takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from weightsmith.evaluation.models import load_tokenizer
from weightsmith.runs.progress import Progress
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.alphadecay.callback import LOG_FILE, AlphaDecayCallback
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.averaged import seeded
from weightsmith.training.averaging.callback import AveragingCallback
from weightsmith.training.callbacks import KeepStates
from weightsmith.training.config import TrainConfig
from weightsmith.training.hrp.durable import attach
from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.options import LightSAMOptions
from weightsmith.training.lightsam.sam import SAM
from weightsmith.training.meap.durable import MaskedBatches
from weightsmith.training.parts import StateAverage, zeroth_order
from weightsmith.training.planning import TrainPlan
from weightsmith.training.tezo.optimizer import LOZO, MeZO, TeZO
from weightsmith.training.zero_token.cycles import CycleSchedule

CANDIDATES = "averaging"
"""Folder inside a work folder with what a mean is made of at the end."""
SELECTION = "selection.json"
"""Beside the metrics: which states the mean was made of."""


def part_callbacks(
    planned: TrainPlan,
    network: Any,
    *,
    workdir: Path,
    metrics: Path,
    states: Path,
    held_out: Sequence[Any],
    progress: Progress,
) -> list[TrainerCallback]:
    """The callbacks of the parts that are switched on.

    Args:
        planned: The run.
        network: The model in training.
        workdir: Where what a killed run needs is kept.
        metrics: The run's metrics; the history of AlphaDecay lies beside them.
        states: Where kept states go.
        held_out: Batches to measure losses on; none where the training data is taken.
        progress: Told about the steps of a preheat.
    """
    config, found = planned.config, []
    last = config.callbacks(planned.model, network)
    masked = None
    if config.objective is not None:
        tokenizer = load_tokenizer(planned.model or workdir / "start")
        masked = MaskedBatches(config.objective, tokenizer, network, planned.seed)
    merge = None
    if config.adapter is not None:
        # First: what others look at are the parameters that are trained.
        masking = masked.mask if masked else None
        merge = attach(planned, network, workdir=workdir, metrics=metrics, masking=masking, progress=progress)
    if isinstance(config.clip, AdaGCOptions):
        found.append(config.clip.callback())
    if (decay := decay_options(config)) is not None:
        found.append(AlphaDecayCallback(decay, log_file=str(metrics.with_name(LOG_FILE))))
    if config.average is not None and config.average.keep:
        found.append(KeepStates(planned, network, states))
    elif config.average is not None:
        found.append(_averaging(config.average, planned.seed, workdir, held_out))
    if planned.model_config.get("training_cycles", "all") != "all":
        found.append(CycleSchedule(network, planned.seed))
    # Last: a mean is loaded into the model before an adapter is merged, and that before an added token goes.
    return [*found, *(part for part in (merge, masked) if part is not None), *last]


def _averaging(average: StateAverage, seed: int, workdir: Path, held_out: Sequence[Any]) -> AveragingCallback:
    """The mean becomes the model that the loop writes; candidates stay until that is done."""
    return AveragingCallback(
        seeded(average, seed).options,
        held_out=held_out or None,
        folder=workdir / CANDIDATES,
        write=False,
        load=True,
        keep_candidates=True,
    )


def decay_options(config: TrainConfig) -> AlphaDecayOptions | None:
    """AlphaDecay's options; a two-pass step restores weights, so decays go through parameter groups there."""
    if config.decay is None or config.sharpness is None:
        return config.decay
    return dataclasses.replace(config.decay, mode="groups")


def optimizer_class(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments of an optimiser of ours; None for the Trainer's own AdamW."""
    if (steps := zeroth_order(config)) is not None:
        own = {field.name: getattr(steps, field.name) for field in dataclasses.fields(steps)}
        return {"tezo": TeZO, "mezo": MeZO, "lozo": LOZO}[steps.kind], {"lr": config.learning_rate, **own}
    options = config.sharpness
    if options is None:
        return None
    own = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if isinstance(options, LightSAMOptions):
        return LightSAM, {"lr": config.learning_rate, **own}
    adamw = {"lr": config.learning_rate, "betas": config.betas, "fused": True}
    return SAM, {"base_optimizer": torch.optim.AdamW, **adamw, **own}
