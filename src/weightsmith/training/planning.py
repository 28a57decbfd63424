"""What a run will read, do and write, known before it starts and without torch (except for rare
architectures).

The plan fixes everything the page left open (learning rate, window length, data to replay), and every name,
dtype and shape of the checkpoint that will come out, so a dry run can tell its exact size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import Ancestor, Checkpoint, Lineage, TensorSpec
from weightsmith.checkpoints.folder import read_object, resolve, side_files
from weightsmith.errors import CheckpointError, InputError, require
from weightsmith.evaluation.models import default_threads, window_length
from weightsmith.runs.environment import versions
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.seeds import derive
from weightsmith.tensors.floats import parse_dtype
from weightsmith.testbed import model_files, parameter_shapes
from weightsmith.training import costs, parts
from weightsmith.training.config import FinetuneConfig, TrainConfig
from weightsmith.training.data import sources
from weightsmith.training.hrp.options import HRPAdapterOptions
from weightsmith.training.lightsam.options import DEFAULTS, LightSAMOptions
from weightsmith.training.meap.files import check_tokenizer_files
from weightsmith.training.sources import DataSource
from weightsmith.training.zero_token.options import MODEL_TYPE, config_of, shapes_of

TESTBED = "testbed/"
ADAPTER_RATE = 8
"""Learning rate of an adapter over that of a fine-tune of all weights."""
# Keys that say how a run is carried out, not what it computes.
_NO_EFFECT = ("device", "threads", "save_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True)
class TrainPlan:
    """A run with nothing left open.

    Attributes:
        config: The config with every default that depends on the model filled in.
        seed: The run's seed.
        from_weights: Whether it starts from the model's weights or from random ones.
        model: Folder it starts from; None where its files are made here and lie in `side_files`.
        model_config: Content of its `config.json`.
        specs: Every tensor of the checkpoint to come.
        side_files: Every other file of it, by name.
        lineage: Its `weightsmith.json`.
        prediction: Memory, disk and time; the disk of kept states included.
        warnings: What works and is hardly meant.
    """

    config: TrainConfig
    seed: int
    from_weights: bool
    model: Path | None
    model_config: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    side_files: Mapping[str, Path | bytes]
    lineage: Lineage
    prediction: Prediction
    warnings: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(spec.numel for spec in self.specs)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the result: checkpoints of another run are never continued."""
        shapes = [(spec.name, spec.dtype, spec.shape) for spec in self.specs]
        text = json.dumps([self.lineage.to_json(), dict(self.model_config), shapes], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan(config: TrainConfig, model: str | Path, *, seed: int) -> TrainPlan:
    """Plan a run.

    Args:
        config: A `FinetuneConfig` starts from the model's weights, a plain `TrainConfig` from random ones.
        model: `testbed/<size>`, a folder with `config.json` (and weights, for a fine-tune), or a hub id.
        seed: The run's seed.

    Raises:
        InputError: a value out of range, unknown data, or nothing known to replay.
        CheckpointError: the model can't be read, or can't be trained as it is.
    """
    config.check()
    from_weights = isinstance(config, FinetuneConfig)
    ancestors: tuple[Ancestor, ...] = ()
    parent: Lineage | None = None
    folder: Path | None = None
    carried: Mapping[str, Path] = {}
    if from_weights:
        with Checkpoint.open(model) as checkpoint:
            _refuse_what_cannot_be_trained(checkpoint)
            folder = checkpoint.path
            model_config: Mapping[str, Any] = checkpoint.config
            specs = tuple(
                TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()
            )
            carried = config.carried(folder)
            files: dict[str, Path | bytes] = {**checkpoint.side_file_map(), **carried}
            ancestors, parent = (Ancestor.of(checkpoint, "base"),), checkpoint.lineage
    elif str(model).startswith(TESTBED) and not Path(model).exists():
        texts = model_files(str(model)[len(TESTBED) :])
        files = {name: text.encode() for name, text in texts.items()}
        model_config = json.loads(texts["config.json"])
        specs = _initial_specs(model_config, None)
    else:
        folder, name = resolve(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{name}: no config.json to make a model from")
        model_config = read_object(folder / "config.json")
        files = dict(side_files(folder))
        specs = _initial_specs(model_config, folder)
    if config.architecture is not None:
        model_config = config_of(model_config, config.architecture, converting=False)
        files["config.json"] = (json.dumps(model_config, indent=2, sort_keys=True) + "\n").encode()
        folder, specs = None, _initial_specs(model_config, None)
    if config.objective is not None:
        check_tokenizer_files(files, config.objective, str(model))
    resolved = _resolved(config, model_config, sum(spec.numel for spec in specs), parent, str(model))
    resolved = _with_seed(resolved, seed)
    costs.check_fit(resolved, specs)
    lineage = Lineage(
        method="finetune" if from_weights else "train",
        parameters=_parameters(resolved, model_config) | ({"carried": sorted(carried)} if carried else {}),
        seed=seed,
        inputs=ancestors,
        versions=versions(),
    )
    return TrainPlan(
        config=resolved,
        seed=seed,
        from_weights=from_weights,
        model=folder,
        model_config=model_config,
        specs=specs,
        side_files=files,
        lineage=lineage,
        prediction=costs.predict(resolved, model_config, specs, files, lineage),
        warnings=parts.warnings(resolved),
    )


def _refuse_what_cannot_be_trained(checkpoint: Checkpoint) -> None:
    if checkpoint.quantized:
        raise CheckpointError(f"{checkpoint.name}: can't be trained: {checkpoint.quantized}")
    if (checkpoint.path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{checkpoint.name}: an adapter; merge it into its base first (`weightsmith merge` with method "
            "linear)"
        )


def _resolved(
    config: TrainConfig,
    model_config: Mapping[str, Any],
    num_parameters: int,
    parent: Lineage | None,
    model: str,
) -> TrainConfig:
    text = model_config.get("text_config") or model_config
    width = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
    rate, sharpness = config.learning_rate, config.sharpness
    if rate is None and isinstance(sharpness, LightSAMOptions) and sharpness.variant != "adam":
        rate = DEFAULTS[sharpness.variant][0]  # a length of the step, which the model's width doesn't decide
    if rate is None:
        if not width:
            raise InputError(
                f"learning_rate: {model} doesn't tell its width (hidden_size), so it must be given"
            )
        rate = (0.144 if isinstance(config, FinetuneConfig) else 0.192) / width
        rate *= ADAPTER_RATE if config.adapter is not None else 1
    own_betas = isinstance(sharpness, LightSAMOptions) or parts.zeroth_order(config) is not None
    replayed = config.replay_data
    if config.replay and replayed is None:
        replayed = _trained_on(parent, model)
    return dataclasses.replace(
        config,
        learning_rate=rate,
        sequence_length=config.sequence_length or window_length(model_config),
        threads=config.threads or default_threads(num_parameters),
        replay_data=replayed if config.replay else None,
        betas=config.betas if own_betas else config.betas or (0.9, 0.95),
        average=_with_held_out(config),
        **_with_preheat(config),
    )


def _with_preheat(config: TrainConfig) -> dict[str, Any]:
    """Steps of HRP's preheat, and what they leave for the training."""
    if not isinstance(adapter := config.adapter, HRPAdapterOptions):
        return {}
    taken = adapter.steps_of(config.steps)
    left = config.steps - (taken if adapter.count_preheat else 0)
    return {"adapter": dataclasses.replace(adapter, preheat_steps=taken), "steps": left}


def _with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """Directions follow from the run's seed; there are no gradients to clip."""
    if (steps := parts.zeroth_order(config)) is None:
        return config
    seeded = dataclasses.replace(steps, seed=derive(seed, "directions"))
    return dataclasses.replace(config, optimizer=seeded, clip=0.0)


def _with_held_out(config: TrainConfig) -> parts.StateAverage | None:
    """What losses are measured on where the page leaves it open: other text of the same test-bed tasks."""
    average = config.average
    if average is None or not average.measures or average.held_out is not None:
        return average
    bed = tuple(entry for entry in sources(config.data) if entry.kind == "testbed")
    if not bed and average.options.objective == "val":
        raise InputError(
            "average: objective `val` needs `held_out`: nothing is held out of this data by itself"
        )
    return dataclasses.replace(average, held_out=bed or None)


def _trained_on(parent: Lineage | None, model: str) -> tuple[DataSource, ...]:
    """The data that a checkpoint of ours was trained on, from its lineage."""
    entries = parent.parameters.get("data") if parent else None
    if not entries:
        raise InputError(
            f"replay: {model} doesn't say what it was trained on (no weightsmith.json of a training); set "
            "replay_data"
        )
    return sources(
        tuple(
            DataSource(**{key: value for key, value in entry.items() if key != "fingerprint"})
            for entry in entries
        )
    )


def _parameters(config: TrainConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the lineage says: every key that decides the result."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)  # a stage of a recipe adds keys of its own
        if field.name not in (*_NO_EFFECT, *parts.KEYS, "data", "replay_data")
    }
    values |= parts.described(config)
    values["betas"] = list(config.betas) if config.betas else None
    values["data"] = [_described(entry) for entry in sources(config.data)]
    replayed = sources(config.replay_data) if config.replay_data is not None else ()
    values["replay_data"] = [_described(entry) for entry in replayed]
    if config.average is not None and config.average.held_out is not None:
        values["held_out"] = [_described(entry) for entry in sources(config.average.held_out)]
    values["architecture"] = model_config.get("model_type")
    return values


def _described(entry: DataSource) -> dict[str, Any]:
    """A source as JSON: what differs from the defaults, no absolute path, and the fingerprint of its
    content.
    """
    values = {
        field.name: getattr(entry, field.name)
        for field in dataclasses.fields(entry)
        if getattr(entry, field.name) != field.default
    }
    if Path(entry.source).is_absolute():
        values["source"] = Path(entry.source).name
    return {**values, "fingerprint": entry.fingerprint()}


def _initial_specs(config: Mapping[str, Any], folder: Path | None) -> tuple[TensorSpec, ...]:
    """Tensors of a model made from its config, in the dtype that the config names (float32 where it names
    none).
    """
    dtype = parse_dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
    if config.get("model_type") == "llama":
        shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(config)
    elif config.get("model_type") == MODEL_TYPE:
        shapes = shapes_of(config)
    else:
        shapes = _shapes_of_any_model(folder)
    return tuple(TensorSpec(name, dtype, shape) for name, shape in sorted(shapes.items()))


def _shapes_of_any_model(folder: Path | None) -> dict[str, tuple[int, ...]]:
    """Stored names and shapes of any architecture, from the model itself without memory for its weights."""
    transformers = require("transformers", extra="hf", needed_by="training from random weights")
    import torch

    from weightsmith.training.weights import stored_tensors

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    return {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
