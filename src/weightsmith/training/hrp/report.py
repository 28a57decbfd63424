"""What HRP found, as JSON beside an adapter; and the file that keeps directions."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.runs.atomic import system_faults, write_json

FILE = "hrp.json"
"""Name of a report beside an adapter."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer.

    Attributes:
        rank: Directions kept.
        preheat_rank: Rank of the large adapter.
        singular_values: Of its product, without its scale; of experts the root mean square.
        captured: Part of the product's energy (squared singular values) in the directions kept.
        gap: The last value kept over the first one left out; near 1 the choice between them is arbitrary.
        None
            where nothing is left out.
        known: Directions that the product had; the rest are random.
        defect: How far the rows written are from orthonormal after rounding to the adapter's dtype.
        fallback: Why all of them are random; None as a rule.
    """

    rank: int
    preheat_rank: int
    singular_values: tuple[float, ...]
    captured: float
    gap: float | None
    known: int
    defect: float
    fallback: str | None = None


@dataclass(frozen=True, kw_only=True)
class HRPReport:
    """An initialisation.

    Attributes:
        layers: By name; none where directions were given.
        losses: Of the preheat's steps.
        steps: How many they were.
        skipped: Layers of kinds that HRP doesn't know; they begin as PEFT made them.
        preheat_seconds: Seconds of training.
        extract_seconds: Seconds of finding directions.
    """

    layers: Mapping[str, LayerReport]
    losses: tuple[float, ...]
    steps: int
    skipped: tuple[str, ...] = ()
    preheat_seconds: float = 0.0
    extract_seconds: float = 0.0

    @property
    def captured(self) -> float:
        """Mean over layers of the energy that the directions kept have."""
        return sum(layer.captured for layer in self.layers.values()) / max(1, len(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Everything but times: the same run gives the same bytes."""
        layers = {
            name: dataclasses.asdict(layer) | {"singular_values": list(layer.singular_values)}
            for name, layer in self.layers.items()
        }
        return {
            "steps": self.steps,
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": self.losses[-1] if self.losses else None,
            "losses": list(self.losses),
            "captured": self.captured,
            "skipped": list(self.skipped),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> HRPReport:
        """What `to_json` gave."""
        layers = {}
        for name, layer in record["layers"].items():
            values = tuple(layer["singular_values"])
            layers[name] = dataclasses.replace(LayerReport(**layer), singular_values=values)
        return cls(
            layers=layers,
            losses=tuple(record["losses"]),
            steps=record["steps"],
            skipped=tuple(record["skipped"]),
        )

    def save(self, folder: str | Path) -> Path:
        """Write `hrp.json` into an adapter's folder."""
        path = Path(folder) / FILE
        write_json(path, self.to_json())
        return path


def write_cache(
    path: str | Path, identity: Mapping[str, str], state: Mapping[str, Tensor], report: HRPReport
) -> None:
    """Keep directions with what they were found for; the file appears when it is complete."""
    from safetensors.torch import save_file

    path = Path(path)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"identity": json.dumps(dict(identity)), "report": json.dumps(report.to_json())}
    with system_faults(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(state), str(hidden), metadata=metadata)
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)


def read_cache(path: str | Path, identity: Mapping[str, str]) -> tuple[dict[str, Tensor], HRPReport] | None:
    """What `write_cache` kept; None where the file is missing.

    Raises:
        InputError: it is no such file, or was found with other options: names the first.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise InputError(
            f"{path}: can't be read as safetensors: {problem}; remove it to preheat anew"
        ) from problem
    if "identity" not in metadata or "report" not in metadata:
        raise InputError(f"{path}: no directions of HRP; remove it to preheat anew")
    kept = json.loads(metadata["identity"])
    for name in sorted(kept.keys() | identity.keys()):
        if kept.get(name) != identity.get(name):
            raise InputError(
                f"{path}: found with {name} {kept.get(name, 'absent')}, now {identity.get(name, 'absent')}; "
                "remove it to preheat anew"
            )
    return state, HRPReport.from_json(json.loads(metadata["report"]))
