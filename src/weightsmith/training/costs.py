"""What a training costs, and whether its parts fit its model: from names and shapes, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import Lineage, TensorSpec
from weightsmith.checkpoints.names import layer_index
from weightsmith.errors import InputError
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.speed import matmul_flops
from weightsmith.training import states
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.averaging.options import LEARNED, RUNNING
from weightsmith.training.config import TrainConfig
from weightsmith.training.hrp.options import MOST_RANK, HRPAdapterOptions, LoRAOptions
from weightsmith.training.lightsam.options import LightSAMOptions
from weightsmith.training.parts import StateAverage, kept_steps, zeroth_order
from weightsmith.training.tezo.options import LOZOOptions, TeZOOptions, ZerothOrderOptions
from weightsmith.training.zero_token.options import repeated_parameters

PROCESS_BYTES = 560_000_000  # a Python that has imported torch and transformers.Trainer
_PEFT_BYTES = 60_000_000  # imported for an adapter
GPU_FLOPS = 5e13  # assumed of any GPU: a forecast to the order of magnitude
# Bytes of optimiser state for each weight, the copy included that a two-pass step restores from.
_STATE_BYTES = {None: 8, "sam": 12, "adam": 20, "adagrad": 12, "adagrad_norm": 4}
# Operations of a Gram matrix and its eigenvalues, relative to (smaller side)^2 * larger side.
_SPECTRUM = 6.0
_MATRIX_SECONDS = 1e-3
# Seconds to draw one Gaussian number on a CPU, and to read and write one weight.
_DRAW_SECONDS, _SWEEP_SECONDS = 4.5e-9, 5e-10


def check_fit(config: TrainConfig, specs: Sequence[TensorSpec]) -> None:
    """Refuse options that name tensors which the model doesn't have.

    Raises:
        InputError: a pattern that finds nothing or is none; no matrix for AlphaDecay.
    """
    names = [spec.name for spec in specs]
    # Experts are many tensors in files and one in memory: their names are known when the model is loaded.
    if isinstance(config.clip, AdaGCOptions) and not any("expert" in name for name in names):
        for key, patterns in (("exclude", config.clip.exclude), ("stacked", config.clip.stacked)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise InputError(
                        f"clip: adagc.{key}: `{pattern}` matches no parameter; names are like {names[0]}"
                    )
    if config.decay is not None and not _matrices(config.decay, specs):
        raise InputError(
            f"decay: alphadecay finds no matrix in the model's layers with sides of at least "
            f"{config.decay.min_dim} (min_dim) that `include` and `exclude` leave"
        )


def _matrices(options: AlphaDecayOptions, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    def finds(patterns: Sequence[str], name: str) -> bool:
        try:
            return any(re.search(pattern, name) for pattern in patterns)
        except re.error as wrong:
            raise InputError(f"decay: {wrong.pattern!r} is no regular expression: {wrong}") from wrong

    return [
        spec
        for spec in specs
        if len(spec.shape) in (2, 3)
        and layer_index(spec.name) is not None
        and min(spec.shape[-2:]) >= options.min_dim
        and (not options.include or finds(options.include, spec.name))
        and not finds(options.exclude, spec.name)
    ]


def predict(
    config: TrainConfig,
    model_config: Mapping[str, Any],
    specs: tuple[TensorSpec, ...],
    files: Mapping[str, Path | bytes],
    lineage: Lineage,
) -> Prediction:
    """Memory from weights, gradients, optimiser state and activations; time from this machine's matrix
    products. The disk of the result and of kept states is exact.
    """
    text = model_config.get("text_config") or model_config
    parameters = sum(spec.numel for spec in specs)
    length = config.sequence_length or 0
    copies = 2 if config.objective is not None and config.objective.mode == "sft" else 1  # at most
    tokens = config.batch_size * length * copies
    layers = text.get("num_hidden_layers") or text.get("n_layer") or 12
    width = text.get("hidden_size") or text.get("n_embd") or 512
    inner = text.get("intermediate_size") or 4 * width
    vocabulary = text.get("vocab_size") or 32_000
    # Float32 values kept for the backward pass, per token: in a layer about 14 of its width and 4 of its
    # MLP's; logits twice, as they are and as probabilities, and their gradient.
    activations = 4 * tokens * (layers * (14 * width + 4 * inner) + 3 * vocabulary)
    rate = GPU_FLOPS if config.device != "cpu" and os.path.exists("/dev/nvidia0") else matmul_flops()
    rate *= max(1, config.threads or 1)
    # Products are over half of a step on small models; the rest is memory traffic and calls.
    read = parameters + repeated_parameters(model_config, {spec.name: spec.numel for spec in specs})
    one_pass = 1.7 * 6.0 * tokens * (read + layers * length * width) / rate
    adapter = config.adapter
    trained = specs if adapter is None else adapter_specs(adapter, specs, adapter.rank)
    num_trained = sum(spec.numel for spec in trained)
    if adapter is not None:
        one_pass *= _adapter_factor(num_trained / parameters)
    passes = config.steps * config.gradient_accumulation * (1 if config.sharpness is None else 2)
    seconds = one_pass * passes + 4.0
    kind = "sam" if config.sharpness is not None else None
    if isinstance(config.sharpness, LightSAMOptions):
        kind = config.sharpness.variant
    state = _STATE_BYTES[kind] * num_trained
    memory = 4 * parameters + 4 * num_trained + state + activations
    if (steps := zeroth_order(config)) is not None:
        # Neither gradients nor what a backward pass wants kept: one layer's values, and the logits.
        state = _zeroth_order_bytes(steps, trained)
        memory = 4 * parameters + state + activations // layers + 8 * tokens * vocabulary
        sweep = _sweep_seconds(steps, num_trained)
        seconds = 2 / 3 * one_pass * passes + 3 * sweep * config.steps + 4.0
    if config.decay is not None:
        looks = -(-config.steps // config.decay.interval)
        matrices = _matrices(config.decay, specs)
        work = sum(min(spec.shape[-2:]) * spec.numel for spec in matrices)
        seconds += looks * (_SPECTRUM * work / rate + _MATRIX_SECONDS * len(matrices))
        memory += 12 * max(min(spec.shape[-2:]) ** 2 for spec in matrices)
    disk = states.folder_bytes(specs, files, lineage)
    if adapter is not None:
        state += 4 * num_trained
        disk += 4 * num_trained if adapter.keeps_base else 0
    if isinstance(adapter, HRPAdapterOptions):
        rank = adapter.preheat_rank if isinstance(adapter.preheat_rank, int) else None
        large = adapter_specs(adapter, specs, rank or min(MOST_RANK, 16 * adapter.rank))
        num_large = sum(spec.numel for spec in large)
        memory = max(memory, 4 * parameters + 16 * num_large + activations)
        heavier = _adapter_factor(num_large / parameters) / _adapter_factor(num_trained / parameters)
        seconds += one_pass * heavier * adapter.steps_of(config.steps) * config.gradient_accumulation
    if adapter is not None:
        memory += _PEFT_BYTES
    # Of durable checkpoints there is one more than are kept while it is written.
    scratch = (config.keep_checkpoints + 1) * (4 * parameters + state) if config.save_every else 0
    if config.average is not None:
        more = _averaging(config.average, config.steps, parameters, one_pass)
        memory, seconds, scratch = (
            memory + more.memory_bytes,
            seconds + more.seconds,
            scratch + more.scratch_bytes,
        )
        if config.average.keep:
            kept = states.state_specs(specs)
            for step in kept_steps(config.average.options, config.steps):
                disk += states.folder_bytes(kept, files, states.state_lineage(lineage, step))
    return Prediction(PROCESS_BYTES + memory, disk, seconds, scratch)


def _adapter_factor(share: float) -> float:
    """A step with an adapter that has a share of the weights' number, over one of all weights: a backward
    pass without their gradients is one product less in three, and small products are mostly calls.
    """
    return 0.8 + 2 * share


def adapter_specs(options: LoRAOptions, specs: Sequence[TensorSpec], rank: int) -> tuple[TensorSpec, ...]:
    """The factors of an adapter of a rank, as far as names tell which matrices are linear layers."""
    wanted = () if options.target == "all-linear" else options.target
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    found = []
    for spec in specs:
        module = spec.name.removesuffix(".weight")
        if len(spec.shape) != 2 or layer_index(spec.name) is None:
            continue
        if wanted and not any(module.endswith(name) or re.fullmatch(name, module) for name in wanted):
            continue
        most = min(rank, *spec.shape) if rank > options.rank else rank
        found.append(TensorSpec(f"{module}.lora", "F32", (most, sum(spec.shape))))
    return tuple(found)


def _zeroth_order_bytes(options: ZerothOrderOptions, specs: Sequence[TensorSpec]) -> int:
    """Factors, and running means of matrices and of the rest; copies that `restore` asks for."""
    averages = {"sgd": 0, "adam": 2}.get(options.variant, 1)
    total = 0
    for spec in specs:
        if isinstance(options, TeZOOptions | LOZOOptions) and len(spec.shape) >= 2:
            rows, columns = spec.shape[0], spec.numel // spec.shape[0]
            rank = options.rank if isinstance(options.rank, int) else getattr(options, "max_rank", 64)
            rank = min(rank, rows, columns)
            if isinstance(options, TeZOOptions):
                total += 4 * rank * (rows + columns + averages)
            else:
                total += 4 * rank * (columns + averages * rows)
        else:
            total += 4 * averages * spec.numel
    return total + (4 * sum(spec.numel for spec in specs) if options.restore == "snapshot" else 0)


def _sweep_seconds(options: ZerothOrderOptions, parameters: int) -> float:
    """Seconds to add a direction to all weights."""
    dense = options.kind == "mezo"
    return parameters * (_SWEEP_SECONDS + (_DRAW_SECONDS if dense else 0.0))


def _averaging(average: StateAverage, steps: int, parameters: int, one_pass: float) -> Prediction:
    """What averaging adds to a run; `one_pass` is the seconds of a forward and backward pass of a batch."""
    options = average.options
    if average.keep:
        return Prediction(0, 0, 0.0)
    if options.method in RUNNING:
        return Prediction(8 * parameters, 0, 0.0, 2 * 4 * parameters)
    number = len(kept_steps(options, steps))
    candidates = 4 * parameters * number
    seconds = candidates / 1e9  # written, and read at the end
    copies = 4 * parameters  # the run's own weights while the mean is in their place
    if options.method in LEARNED:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        in_memory = candidates <= 0.5 * free
        copies += candidates if in_memory else 0
        passes = learning_passes(average, number)
        # A mixture reads the candidates twice in an iteration, from memory ten times as fast as from files.
        seconds += passes * (one_pass + 2 * candidates / (1e10 if in_memory else 1e9))
    return Prediction(copies, 0, seconds, candidates)


def learning_passes(average: StateAverage, number: int) -> float:
    """Passes forward and backward that a choice among `number` candidates takes; forward alone is a third."""
    options = average.options
    if options.method in ("best", "greedy"):
        return options.batches * number * (2 if options.method == "greedy" else 1) / 3
    scored = 10 if options.num_select == "auto" else 0
    return options.sewa.steps * options.sewa.mc_samples + options.batches * (
        scored / 3 + 3 * options.sewa.polish
    )
