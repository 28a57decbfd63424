"""The keys of the recipe stages `train` and `finetune`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from weightsmith.errors import InputError
from weightsmith.training import parts
from weightsmith.training.meap.options import MEAPOptions
from weightsmith.training.sources import DataSource
from weightsmith.training.zero_token.options import ZTTOptions

if TYPE_CHECKING:
    from transformers import TrainerCallback

Data = str | DataSource | tuple[str | DataSource, ...] | list[str | DataSource]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained from random weights, by next-token prediction."""

    objective: ClassVar[parts.Objective] = None
    architecture: ClassVar[ZTTOptions | None] = None

    data: Data
    """What to train on: one source or a list of them, mixed evenly unless they carry a `weight`."""
    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 24
    """Windows per forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    sequence_length: int | None = None
    """Tokens per window; by default a quarter of the positions the model was made for, at most 1,024."""
    learning_rate: float | None = None
    """Peak learning rate; by default inverse to the model's width: 0.192 / width from random weights, 0.144 /
    width for a fine-tune (7e-5 at a width of 2,048), eight times that for an adapter."""
    optimizer: InitVar[parts.Optimizer] = None
    """What steps: `adamw`, which needs gradients, or one that needs two losses: `tezo`, `mezo`, `lozo`."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and linear end at 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms and biases have none."""
    decay: parts.Decay = None
    """How weight decay is shared out: `uniform`, or by matrix with `alphadecay`."""
    betas: tuple[float, float] | None = None
    """Decay rates of AdamW's two moments, [0.9, 0.95] by default; LightSAM takes its own."""
    clip: parts.Clip = parts.CLIP
    """Which norm of gradients is held down: of all together (`global`), of each tensor (`adagc`), none
    (`off`)."""
    sharpness: parts.Sharpness = None
    """Whether steps look for flat minima, at two passes each: `off`, `sam`, `asam` or `lightsam`."""
    average: parts.StateAverage | None = None
    """What becomes of the run's states: `off`, `keep`, or the mean that a method makes of them."""
    layer_drop: float = 0.0
    """Chance that an inner layer is skipped in a step, which makes depth prunable later."""
    replay: float = 0.0
    """Fraction of the windows taken from `replay_data`, so that a fine-tune forgets less."""
    replay_data: Data | None = None
    """What to replay; by default what the starting model was trained on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass; weights and optimiser state stay float32."""
    device: str = "auto"
    """`auto` (CUDA where there is one) or `cpu`."""
    threads: int | None = None
    """Intra-op threads; by default one for models under ten million parameters, else all cores."""
    save_every: int = 100
    """Steps between durable checkpoints, from which a killed run continues; 0 keeps none."""
    keep_checkpoints: int = 1
    """Durable checkpoints kept while the run goes on."""
    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""

    adapter: ClassVar[parts.Adapter] = None  # below `optimizer`: a subclass is given both, in this order

    def __post_init__(self, optimizer: parts.Optimizer) -> None:
        # No field: `asdict` is in the key by which finished test-beds, hours of work, are found again.
        object.__setattr__(self, "optimizer", optimizer)

    def check(self) -> None:
        """Check values and data without reading any.

        Raises:
            InputError: a value out of range, a missing file or an unknown name; begins with the key.
        """
        from weightsmith.training.data import sources

        for key in ("steps", "batch_size", "gradient_accumulation", "log_every", "keep_checkpoints"):
            _expect(key, getattr(self, key), getattr(self, key) >= 1, "at least 1")
        for key in ("warmup_steps", "save_every", "weight_decay"):
            _expect(key, getattr(self, key), getattr(self, key) >= 0, "at least 0")
        for key in ("sequence_length", "threads"):
            value = getattr(self, key)
            _expect(
                key, value, value is None or value >= (2 if key == "sequence_length" else 1), "at least 2"
            )
        rate = self.learning_rate
        _expect("learning_rate", rate, rate is None or rate > 0, "above 0")
        _expect("betas", self.betas, all(0 <= beta < 1 for beta in self.betas or ()), "two numbers in 0..1")
        _expect("layer_drop", self.layer_drop, 0 <= self.layer_drop < 1, "in 0..1, below 1")
        _expect("replay", self.replay, 0 <= self.replay < 1, "in 0..1, below 1")
        sources(self.data)
        if self.replay_data is not None:
            sources(self.replay_data)
        parts.check(self)

    def carried(self, model: Path) -> Mapping[str, Path]:
        """Files of the starting model's folder, beside what every copy has, that hold for the result too: by
        name. A stage may know some.
        """
        return {}

    def callbacks(self, model: Path | None, network: Any) -> list[TrainerCallback]:
        """What else takes part in the training of `network`, which was loaded from `model`: a stage may have
        something. Called before an adapter is put on it; they come last when training ends.
        """
        return []

    def data_fingerprint(self) -> str:
        """Stands for the content of all data; changes when a file or the test-bed's code changes.

        Raises:
            InputError: as `check`.
        """
        from weightsmith.training.data import sources

        digest = hashlib.blake2b(digest_size=16)
        replayed = self.replay_data if self.replay and self.replay_data is not None else ()
        held_out = self.average.held_out if self.average is not None else None
        further = [data for data in (replayed, held_out) if data]
        for entry in (*sources(self.data), *(entry for data in further for entry in sources(data))):
            digest.update(f"{entry!r}={entry.fingerprint()}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """How a trained model is trained further."""

    steps: int = 150
    """Optimiser steps."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    adapter: InitVar[parts.Adapter] = None  # pyrefly: ignore[bad-override]
    """What is trained: the weights (`none`), or a `lora` adapter that is merged into them in the end, which
    may start with `hrp`."""

    def __post_init__(self, optimizer: parts.Optimizer, adapter: parts.Adapter) -> None:
        super().__post_init__(optimizer)
        object.__setattr__(self, "adapter", adapter)


def _expect(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{key}: expected {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MEAPTrainConfig(TrainConfig):
    """`TrainConfig` with masked inputs."""

    # Not a field of every config: one that doesn't use it stands for what it always did.
    objective: parts.Objective = field(default_factory=MEAPOptions)  # pyrefly: ignore[bad-override]
    """What the model reads and predicts."""


@dataclass(frozen=True, kw_only=True)
class MEAPFinetuneConfig(FinetuneConfig):
    """`FinetuneConfig` with masked inputs."""

    objective: parts.Objective = field(default_factory=MEAPOptions)  # pyrefly: ignore[bad-override]
    """What the model reads and predicts."""
