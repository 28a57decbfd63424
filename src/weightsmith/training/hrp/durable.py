"""The key `adapter` in the loop behind the stage `finetune`: an adapter is trained, then merged into the
weights.

The loop sees the model with LoRA layers in it; its durable checkpoints hold both, and a killed run goes on.
What comes out is a whole checkpoint, as of any fine-tune, and the adapter beside the metrics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from weightsmith.checkpoints.folder import ADAPTER_CONFIG
from weightsmith.errors import InputError, require
from weightsmith.evaluation.models import load_tokenizer
from weightsmith.runs.atomic import read_json, sync_folder, system_faults, write_json
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.data import collate, mixture
from weightsmith.training.hrp.initialize import initialize_lora_hrp_weights
from weightsmith.training.hrp.options import HRPAdapterOptions, LoRAOptions
from weightsmith.training.hrp.report import FILE
from weightsmith.training.planning import TrainPlan
from weightsmith.training.zero_token.options import EXTRA_MODULES

ADAPTER = "adapter"
"""Folder beside the metrics: the adapter that was merged."""
_KEPT = "hrp-"
_RANKS = "ranks.json"
_LAYOUT = ("target_modules", "rank_pattern", "alpha_pattern")
"""Fields of PEFT's configuration that a start may change, kept in that file: ranks shared out anew, layers
left without an adapter. It outlives the training: a run killed while it writes its result needs it.
"""
Masking = Callable[[dict[str, Any], int], dict[str, Any]]


def attach(
    planned: TrainPlan,
    network: Any,
    *,
    workdir: Path,
    metrics: Path,
    masking: Masking | None,
    progress: Progress,
) -> TrainerCallback:
    """Put the adapter of a run into its model and start it.

    Args:
        planned: The run.
        network: The model; it has LoRA layers afterwards.
        workdir: Where directions are kept until the run is done, and ranks beyond.
        metrics: The run's metrics.
        masking: What masks a batch by its number, where the objective does.
        progress: Told about the steps of a preheat.

    Returns:
        What makes the model whole again when training ends.

    Raises:
        InputError: no module that an adapter can have; a loss that is no number.
        MissingExtraError: peft is not installed.
    """
    peft = require("peft", extra="hf", needed_by="an adapter")
    options = planned.config.adapter
    assert isinstance(options, LoRAOptions)
    goes_on = any(workdir.glob("checkpoint-*"))
    folder = metrics.with_name(ADAPTER)
    cache = workdir / f"{_KEPT}{planned.fingerprint}.safetensors"
    layout = workdir / _RANKS
    config = begun = _config(peft, network, options)
    if goes_on:  # its weights, the adapter's among them, are loaded over any start
        kept = read_json(layout) if layout.exists() else {}
        begun = dataclasses.replace(config, init_lora_weights=True, eva_config=None, **kept)
    with _own_random(derive(planned.seed, "adapter")), _told():
        model = peft.get_peft_model(network, begun)
    own = model.peft_config["default"]  # tells, where it is stored, how the adapter began
    own.init_lora_weights, own.eva_config = config.init_lora_weights, config.eva_config
    if not goes_on:
        _forget(workdir, folder, cache)
        layout.unlink(missing_ok=True)
        batches = _Batches(planned, workdir, masking, network.device)
        if isinstance(options, HRPAdapterOptions):
            found = dataclasses.replace(
                options.hrp.at_rate(planned.config.learning_rate),
                seed=derive(planned.seed, "hrp"),
            )
            report = initialize_lora_hrp_weights(
                model, train_step=batches.train_step, options=found, cache_file=cache, progress=progress
            )
            report.save(folder.parent)
        elif options.init == "eva":
            with _own_random(derive(planned.seed, "eva")):
                first = batches.first(options.init_batches)
                peft.initialize_lora_eva_weights(model, first, show_progress_bar=False)
        own = model.peft_config["default"]
        if own.rank_pattern:
            fields = {name: getattr(own, name) for name in _LAYOUT}
            write_json(layout, fields | {"target_modules": _in_order(own.target_modules)})
    return _Merge(model, network, planned, folder, cache)


def _forget(workdir: Path, folder: Path, cache: Path) -> None:
    """What a run with other options left here."""
    for other in workdir.glob(f"{_KEPT}*"):
        if other != cache:
            other.unlink()
    folder.with_name(FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class _Batches:
    """Batches that the run itself doesn't read: those that follow its own in the same stream."""

    def __init__(self, planned: TrainPlan, workdir: Path, masking: Masking | None, device: Any) -> None:
        self._config, self._masking, self._device = planned.config, masking, device
        config = planned.config
        self._per_step = config.gradient_accumulation
        own = config.steps * self._per_step
        more = self._number_of_batches(config.adapter)
        self._start = own
        if not more:
            return
        self._examples = mixture(
            config.data,
            config.replay_data or (),
            config.replay,
            tokenizer=load_tokenizer(planned.model or workdir / "start"),
            length=config.sequence_length or 0,
            num_examples=(own + more) * config.batch_size,
            seed=derive(planned.seed, "data"),
        )

    def train_step(self, model: nn.Module, step: int) -> Tensor:
        """Mean loss of a step's batches; all but the last have had their backward pass."""
        total = torch.zeros((), device=self._device)
        for part in range(self._per_step):
            batch = self._batch(step * self._per_step + part)
            with self._arithmetic():
                loss = model(**batch).loss / self._per_step
            if part < self._per_step - 1:
                loss.backward()
                loss = loss.detach()
            total = total + loss
        return total

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first batches of these."""
        return [self._batch(number) for number in range(count)]

    def _batch(self, number: int) -> dict[str, Any]:
        size = self._config.batch_size
        first = (self._start + number) * size
        batch = collate([self._examples[index] for index in range(first, first + size)])
        if self._masking is not None:
            batch = self._masking(batch, self._start + number)
        return {key: value.to(self._device) for key, value in batch.items()}

    def _number_of_batches(self, options: Any) -> int:
        if isinstance(options, HRPAdapterOptions):
            return options.steps_of(None) * self._per_step
        return options.init_batches if options.init == "eva" else 0

    def _arithmetic(self) -> Any:
        if self._config.dtype == "bfloat16":
            return torch.autocast(self._device.type, torch.bfloat16)
        return contextlib.nullcontext()


class _Merge(TrainerCallback):
    """Write the adapter, then merge it: the loop stores a model as it was given one."""

    def __init__(self, model: Any, network: Any, planned: TrainPlan, folder: Path, cache: Path) -> None:
        self._model, self._network, self._planned = model, network, planned
        self._folder, self._cache = folder, cache

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a plain model."""
        options = self._planned.config.adapter
        assert options is not None
        if options.keeps_base:
            self._write()
        self._cache.unlink(missing_ok=True)
        self._model.merge_and_unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(self._network).pop(name, None)

    def _write(self) -> None:
        """The adapter as PEFT stores it, in one rename; its base is named, not found: paths are another
        machine's.
        """
        hidden = self._folder.with_name(f".{self._folder.name}.{os.getpid()}")
        with system_faults(self._folder):
            try:
                self._model.save_pretrained(str(hidden))
                (hidden / "README.md").unlink(missing_ok=True)
                config = read_json(hidden / ADAPTER_CONFIG)
                config["base_model_name_or_path"] = self._planned.lineage.inputs[0].name
                config["target_modules"] = _in_order(config["target_modules"])
                write_json(hidden / ADAPTER_CONFIG, config)
                report = self._folder.with_name(FILE)
                if report.exists():
                    shutil.copyfile(report, hidden / FILE)
                shutil.rmtree(self._folder, ignore_errors=True)
                os.rename(hidden, self._folder)
                sync_folder(self._folder.parent)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)


def _config(peft: Any, network: Any, options: LoRAOptions) -> Any:
    """PEFT's configuration."""
    start: Any = {"kaiming": True}.get(options.init, options.init)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target if isinstance(options.target, str) else list(options.target),
        use_rslora=options.rslora,
        init_lora_weights=start,
        eva_config=peft.EvaConfig() if start == "eva" else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in network.modules()),
        # Later cycles of a converted model stand behind closed gates: factors alone would not reach them.
        modules_to_save=[name for name, _ in network.named_modules() if name in EXTRA_MODULES] or None,
    )


def _in_order(target: Any) -> Any:
    """Names of modules as they are stored: a set has no order of its own, a pattern stays."""
    return target if isinstance(target, str) else sorted(target)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """PEFT's refusals as ours."""
    try:
        yield
    except ValueError as wrong:
        if isinstance(wrong, InputError):
            raise
        raise InputError(f"adapter: {str(wrong).splitlines()[0]}") from wrong


@contextlib.contextmanager
def _own_random(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        yield
