"""`convert`: a trained model made into one of another architecture, from its weights.

    cycled: {convert: {model: base, to: ztt, num_cycles: 2}}

Training from random weights needs no such stage: `train: {model: testbed/xs, architecture: ztt}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from weightsmith.errors import InputError
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.recipes.validation import validate
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.tensors.floats import BLOCK
from weightsmith.training.zero_token.convert import convert, plan_conversion
from weightsmith.training.zero_token.options import MANY_LAYERS, PRESETS, ZTTOptions, check

_PROCESS_BYTES = 80_000_000  # a Python with numpy
_BYTES_PER_SECOND = 5e8


@dataclass(frozen=True, kw_only=True)
class Convert(ZTTOptions):
    """Keys of the stage: those of `ZTTOptions`, and the model."""

    model: str
    """A stage, folder or hub id: a Llama, Mistral, Qwen2 or Qwen3."""
    to: Literal["ztt", "htc", "bc"] = "ztt"
    """Cycles with zero tokens, head-tail cycling without them, or cycles of all layers."""

    kind: ClassVar[str] = "convert"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = False
    needs_transformers: ClassVar[bool] = False

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
        """The stage from its keys on the page; what `to` stands for is filled in where they are silent."""
        target = body.get("to", "ztt")
        return validate(cls, {**(PRESETS.get(target, {}) if isinstance(target, str) else {}), **body})

    def references(self) -> Sequence[Reference]:
        """The one model."""
        return [Reference(("model",), self.model)]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with the options, whatever the model."""
        try:
            check({**plain(self), "cycle_gate": self.cycle_gate or "off"}, MANY_LAYERS)
        except InputError as wrong:
            key, _, text = str(wrong).partition(": ")
            return [Problem((key,) if hasattr(self, key) else (), text)]
        return []

    def completed(self, earlier: Mapping[str, Any]) -> Convert:
        """Nothing is left to earlier stages."""
        return self

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        return plain(self)

    def data_fingerprint(self) -> str:
        """No data is read."""
        return ""

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Exact size; the time of a copy."""
        planned = plan_conversion(models[self.model], self._options(), seed=workspace.seed)
        standin = write_standin(
            workspace.checkpoint, planned.specs, side_files=planned.side_files, lineage=planned.lineage
        )
        size = folder_bytes(standin)
        largest = max((spec.nbytes for spec in planned.specs if spec.name not in planned.copied), default=0)
        return Forecast(
            prediction=Prediction(
                memory_bytes=_PROCESS_BYTES + 4 * BLOCK + 2 * largest,
                disk_bytes=size,
                seconds=0.5 + size / _BYTES_PER_SECOND,
            ),
            model=standin,
        )

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Write the model."""
        # An attempt killed after its rename left a whole checkpoint; it is written again, the same.
        convert(
            models[self.model],
            workspace.checkpoint,
            self._options(),
            seed=workspace.seed,
            overwrite=True,
            progress=progress,
        )
        return Done({"checkpoint": "checkpoint"}, plain(self))

    def _options(self) -> ZTTOptions:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(ZTTOptions)}
        return ZTTOptions(**own)
