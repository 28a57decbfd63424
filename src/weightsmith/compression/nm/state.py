"""What a run of MaskPro has to remember, in one file that is whole or absent.

Logits, masks and the history are tensors; everything else is JSON in the file's metadata, whose floats come
back bit for bit. The random numbers need no state: they are functions of the seed and the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weightsmith.compression.nm.options import MaskProConfig
from weightsmith.compression.nm.targets import Target
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.atomic import system_faults, write_bytes

STATE_FILE = "maskpro.safetensors"
FORMAT = 2
_MAY_CHANGE = ("steps", "keep")
_NUMBERS_OF_A_TARGET = 4096


@dataclass
class State:
    """A run between two steps.

    Attributes:
        logits: (M, G) by name.
        first: The mask it began with, by name.
        given: Whether that mask came from elsewhere, not by `config.init` from the weights and the data.
        data: The `data_digest` of its batches.
        reference: The mask that residuals are taken against, by name.
        spread: Sums of the logits' squared moves, by name; empty where `certainty` is 0.
        scale: Logit of what the first mask keeps.
        lr: η; None while it is being measured.
        step: Steps done.
        position: Batches taken of the present pass over the data.
        tracker: δ.
        references: Loss of the reference on each batch, by the batch's content; None where it is not known.
        passed: Whether all batches were met once.
        measured: Number, mean and sum of squared deviations of the residuals in the warm-up.
        means: Running means of the loss and of the reference's, and their steps since the reference is new.
        skipped: Steps whose loss was not finite.
        refreshed: Steps after which the reference was made anew.
        losses: Mean loss of the masks that each step tried.
        residuals: What they differed from the reference by.
        repaired: Groups of the first mask that had to be completed.
        fell_back: Whether the run ended with the first mask, as the learnt one was worse.
    """

    logits: dict[str, Tensor]
    first: dict[str, Tensor]
    reference: dict[str, Tensor]
    given: bool
    data: str
    scale: float
    lr: float | None
    step: int = 0
    position: int = 0
    tracker: float = 0.0
    references: dict[str, float | None] = field(default_factory=dict)
    passed: bool = False
    measured: tuple[int, float, float] = (0, 0.0, 0.0)
    means: tuple[float, float, int] = (0.0, 0.0, 0)
    skipped: list[int] = field(default_factory=list)
    refreshed: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    repaired: int = 0
    fell_back: bool = False
    spread: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, config: MaskProConfig, weights: str) -> None:
        """Write the file, in one step; `weights` is the `weights_digest` of the dense model.

        Raises:
            SystemFault: no space, no permission; an old file is untouched.
        """
        tensors = {
            f"{part}.{name}": value.contiguous()
            for part in _BY_NAME
            for name, value in getattr(self, part).items()
        }
        for part in _HISTORIES:
            tensors[part] = torch.tensor(getattr(self, part), dtype=torch.float64)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "weights": weights,
            "state": {k: v for k, v in plain.items() if k not in (*_BY_NAME, *_HISTORIES)},
        }
        write_bytes(path, save(tensors, {"weightsmith": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path, config: MaskProConfig, targets: Sequence[Target], weights: str) -> State:
        """Read the file back.

        Raises:
            CheckpointError: it is damaged or of another kind.
            InputError: it is of another model, of a run with other options, or of more steps than
                `config.steps`; says which.
        """
        try:
            with system_faults(path), safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["weightsmith"])
                if facts["format"] != FORMAT:
                    raise CheckpointError(f"{path}: format {facts['format']!r}, this version reads {FORMAT}")
                _check_config(path, facts["config"], config)
                if facts["weights"] != weights:
                    raise InputError(f"{path}: is of a run on other weights or targets; give another `work`")
                if facts["state"]["step"] > config.steps:
                    raise InputError(
                        f"{path}: is of a run that did {facts['state']['step']} steps, this one has "
                        f"{config.steps}; give as many steps or more, or another `work`"
                    )
                devices = {target.name: target.parameter.device for target in targets}
                parts: dict[str, Any] = {
                    part: {name: file.get_tensor(f"{part}.{name}").to(devices[name]) for name in devices}
                    for part in _BY_NAME
                    if part != "spread" or config.certainty
                }
                for part in _HISTORIES:
                    parts[part] = file.get_tensor(part).tolist()
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as problem:
            raise CheckpointError(f"{path}: not the state of a MaskPro run: {problem}") from problem
        plain = facts["state"]
        for name in ("measured", "means"):
            plain[name] = tuple(plain[name])
        return cls(**parts, **plain)

    def check_run(self, path: Path, data: str, masks: Mapping[str, Tensor] | None) -> None:
        """Refuse to go on from a file in a run that began otherwise.

        Args:
            path: The file, for messages.
            data: The `data_digest` of the run's batches.
            masks: The masks that the run is given to begin with, as integers; None where it finds them.

        Raises:
            InputError: it is of other batches, or began with other masks.
        """
        if data != self.data:
            raise InputError(
                f"{path}: is of a run on other data: {self.data} then, {data} now; give the same batches in "
                "the same order, or another `work`"
            )
        if masks is None and self.given:
            raise InputError(
                f"{path}: is of a run that was given its first masks, this one finds them by `init`; give "
                "the same masks, or another `work`"
            )
        differ = {name: int((codes != self.first[name]).sum()) for name, codes in (masks or {}).items()}
        if any(differ.values()):
            name = max(differ, key=lambda key: differ[key])
            raise InputError(
                f"{path}: is of a run with other first masks: {sum(differ.values())} of "
                f"{sum(map(len, self.first.values()))} groups differ from those given now, most in {name}; "
                "give the same masks, or another `work`"
            )


_BY_NAME = ("logits", "first", "reference", "spread")
_HISTORIES = ("losses", "residuals")


def weights_digest(targets: Sequence[Target]) -> str:
    """Stands for the names, shapes and some numbers of what is pruned."""
    digest = hashlib.blake2b(digest_size=16)
    for target in targets:
        some = target.parameter.detach().flatten()[:_NUMBERS_OF_A_TARGET].float().cpu()
        digest.update(f"{target.name} {target.shape} {target.dim}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _check_config(path: Path, before: Mapping[str, Any], config: MaskProConfig) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    other = [name for name in now if name not in _MAY_CHANGE and now[name] != before.get(name)]
    if other:
        said = ", ".join(f"{name} {before.get(name)!r} then, {now[name]!r} now" for name in other)
        raise InputError(f"{path}: is of a run with other options: {said}; give another `work`")
