"""`prune`: N of every M weights of a model kept, the others 0.

    sparse:  {prune: {model: merged, method: sparsegpt, pattern: "2:4"}}
    learned: {prune: {model: merged, method: {maskpro: {init: magnitude, lr: auto, steps: 2000}}}}

Data are for calibration: windows of held-out text of what the model was trained on, or of what `data` names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.checkpoints import Checkpoint, Lineage, TensorSpec
from weightsmith.checkpoints.folder import MASKS_FILE
from weightsmith.compression.nm.names import stored_matrices
from weightsmith.compression.nm.options import (
    KINDS,
    Export,
    MaskProConfig,
    NMOptions,
    SparseGPTOptions,
    SparseSwapsOptions,
)
from weightsmith.errors import InputError, nearest
from weightsmith.evaluation.costs import TORCH_BYTES
from weightsmith.evaluation.models import load_tokenizer, tokenizer_folder, window_length
from weightsmith.recipes.fingerprint import file_digest
from weightsmith.recipes.stages.contract import Done, Forecast, Problem, Reference, Workspace, plain
from weightsmith.recipes.stages.parts import PageData, choice
from weightsmith.recipes.stages.scoring import trained_on
from weightsmith.recipes.standin import folder_bytes, write_standin
from weightsmith.recipes.validation import validate
from weightsmith.runs.atomic import write_json
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.progress import Progress
from weightsmith.runs.speed import matmul_flops
from weightsmith.training.data import held_out_batches, sources

PRUNING = "pruning.json"
_SHARED = tuple(entry.name for entry in dataclasses.fields(NMOptions))
_EFFICIENCY = 0.35
_MASK_HEAD = 200
"""Bytes that a file of masks has beside the bits of each matrix, about."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Keys of the stage; beside them those of `NMOptions`, and those of the method below its name."""

    model: str
    """A stage, folder or hub id."""
    method: NMOptions = field(default_factory=SparseGPTOptions)
    """`magnitude`, `wanda`, `ria`, `sparsegpt`, `sparseswaps`, `maskpro`."""
    data: PageData | None = None
    """What to calibrate on; by default what the model was trained on."""
    samples: int = 128
    """Windows of calibration data."""
    length: int | None = None
    """Tokens of a window; by default as in training: a quarter of the positions the model was made for, at
    most 1,024."""
    batch_size: int = 8
    """Windows in a forward pass."""
    device: str = "auto"
    """Where the model runs: `auto` (CUDA where there is one) or a torch device."""
    export: Export = "dense"
    """`dense` tensors with zeros, which load anywhere; `semi-structured` writes 2:4 matrices beside them as
    sparse tensor cores take them, and needs a CUDA device."""

    kind: ClassVar[str] = "prune"
    makes_model: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    needs_transformers: ClassVar[bool] = True

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> tuple[Prune | None, list[Problem]]:
        """The stage from its keys on the page, or every problem found."""
        own = {key: value for key, value in body.items() if key not in (*_SHARED, "method")}
        config, problems = validate(cls, own)
        name, options, found = choice("method", body.get("method", "sparsegpt"), list(KINDS))
        if found:
            return None, [*problems, *found]
        if not isinstance(options, Mapping):
            text = f"expected a mapping of options, found {options!r}"
            return None, [*problems, Problem(("method", name), text)]
        shared = {key: body[key] for key in _SHARED if key in body}
        twice = [key for key in shared if key in options]
        if twice:
            text = "is given twice, for the stage and for its method"
            return None, [*problems, *(Problem(("method", name, key), text) for key in twice)]
        method, found = validate(KINDS[name], {**options, **shared})
        for problem in found:
            inside = problem.keys[:1] and problem.keys[0] not in shared
            problems.append(Problem(("method", name, *problem.keys), problem.text) if inside else problem)
        if config is None or method is None or problems:
            return None, problems
        return dataclasses.replace(config, method=method), []

    def references(self) -> Sequence[Reference]:
        """The one model. A folder whose masks are the first ones is none: its file of masks counts as
        data.
        """
        return [Reference(("model",), self.model)]

    def problems(self) -> Sequence[Problem]:
        """What is wrong with numbers and data."""
        found = [
            Problem((key,), f"expected at least 1, got {getattr(self, key)}")
            for key in ("samples", "batch_size")
            if getattr(self, key) < 1
        ]
        if self.length is not None and self.length < 2:
            found.append(Problem(("length",), f"expected at least 2, got {self.length}"))
        if self.data is not None and not self.needs_data:
            found.append(Problem(("data",), f"{self.method.kind} looks at weights alone; leave it out"))
        if (masks := self._first_masks) is not None and not masks.is_file():
            init = self.method.init  # pyrefly: ignore[missing-attribute]
            known = ", ".join(kind for kind in KINDS if kind != MaskProConfig.kind)
            text = (
                f"expected {known}, or the folder or file of masks; {masks} is no file{nearest(init, KINDS)}"
            )
            found.append(Problem(("method", "maskpro", "init"), text))
        if self.export == "semi-structured" and self.method.pattern != "2:4":
            text = f"semi-structured matrices are 2:4, the pattern is {self.method.pattern}"
            found.append(Problem(("export",), text))
        try:
            if self.data is not None:
                sources(self.data)
        except InputError as wrong:
            found.append(Problem(("data",), str(wrong).removeprefix("data ")))
        return found

    def completed(self, earlier: Mapping[str, Any]) -> Prune:
        """What to calibrate on, where the page leaves it open: what the model was trained on."""
        if self.data is not None or not self.needs_data:
            return self
        return dataclasses.replace(self, data=trained_on([self.model], earlier) or None)

    def identity(self) -> dict[str, Any]:
        """See `contract.Stage`."""
        words = {key: value for key, value in plain(self).items() if key not in ("device", "method")}
        options = plain(self.method)
        shared = {key: options.pop(key) for key in _SHARED}
        return {**words, **shared, "method": {self.method.kind: options}}

    def data_fingerprint(self) -> str:
        """Of the calibration data, and of the masks to begin with."""
        read = sources(self.data) if self.data is not None else ()
        found = [f"{entry!r}={entry.fingerprint()}" for entry in read]
        if self._first_masks is not None:
            found.append(f"masks={file_digest(self._first_masks)}")
        return "\n".join(found)

    def forecast(self, models: Mapping[str, Path], workspace: Workspace) -> Forecast:
        """Its cost: passes over the data, and the work of SparseGPT and SparseSwaps on each matrix."""
        self.check_data()
        folder = models[self.model]
        with Checkpoint.open(folder) as checkpoint:
            specs = [
                TensorSpec(info.name, info.dtype, tuple(info.shape)) for info in checkpoint.tensors.values()
            ]
            files, length = checkpoint.side_file_map(), self._window(checkpoint)
        shapes = stored_matrices({spec.name: spec.shape for spec in specs}, self.method)
        masks = sum(math.prod(shape) // 8 + _MASK_HEAD for shape in shapes)
        standin = write_standin(
            workspace.checkpoint,
            specs,
            side_files={**files, MASKS_FILE: b" " * masks},
            lineage=Lineage("prune", inputs=()),
        )
        # Half of the weights, and two bits for the place of each.
        width = max(spec.nbytes // max(1, spec.numel) for spec in specs)
        packed = 9 * width * sum(map(math.prod, shapes)) // 16 if self.export == "semi-structured" else 0
        parameters = sum(spec.numel for spec in specs)
        pruned = sum(map(math.prod, shapes))
        tokens = self.samples * length
        passes, copies = 2.0, 1.0
        flops = 0.0
        if isinstance(self.method, MaskProConfig):
            batches = max(1, -(-self.samples // self.batch_size))
            steps = (
                self.method.steps * self.method.samples_per_step * (1 + (self.method.reference == "online"))
            )
            # Losses of first and final mask, and what it is compared with: three ways, two of which measure.
            passes, copies = steps / batches + 12.0, 3.0
        elif isinstance(self.method, SparseGPTOptions):
            flops = sum(2.0 * rows * columns**2 + columns**3 for rows, columns in shapes)
        elif isinstance(self.method, SparseSwapsOptions):  # half of the sweeps it may take
            flops = sum(2.0 * self.method.sweeps * rows * columns**2 for rows, columns in shapes)
        if not self.needs_data:
            passes = 0.0
        seconds = 1.5 + (2.0 * parameters * tokens * passes + flops) / (_EFFICIENCY * matmul_flops())
        cost = Prediction(
            memory_bytes=TORCH_BYTES + 4 * parameters + round(4 * copies * pruned),
            disk_bytes=folder_bytes(standin) + packed,
            seconds=seconds,
        )
        read = [entry.source for entry in sources(self.data)] if self.data is not None else []
        read += [str(self._first_masks)] if self._first_masks is not None else []
        return Forecast(prediction=cost, model=standin, reads=tuple(read))

    def run(self, models: Mapping[str, Path], workspace: Workspace, progress: Progress) -> Done:
        """Find the masks and write the model; MaskPro goes on from the last durable step."""
        from weightsmith.compression import prune_checkpoint

        self.check_data()
        folder = models[self.model]
        method = self.method
        if isinstance(method, MaskProConfig) and method.seed is None:
            method = dataclasses.replace(method, seed=workspace.seed)
        report = prune_checkpoint(
            folder,
            workspace.checkpoint,
            method,
            self.calibration(folder, seed=workspace.seed),
            data=[entry.source for entry in sources(self.data)] if self.data is not None else (),
            device=self.device,
            work=workspace.work,
            progress=progress,
            export=self.export,
            # An attempt killed after its rename left a whole checkpoint; it is written again, the same.
            overwrite=True,
        )
        write_json(workspace.folder / PRUNING, report.to_json())
        return Done({"checkpoint": "checkpoint", "pruning": PRUNING}, self.identity())

    def calibration(self, model: str | Path, *, seed: int) -> list[dict[str, Any]]:
        """Batches of calibration data: `samples` windows, in batches of `batch_size` and what is left.

        Raises:
            InputError: windows longer than the model; unusable data.
        """
        if self.data is None or not self.needs_data:
            return []
        with Checkpoint.open(model) as checkpoint:
            words, length = tokenizer_folder(checkpoint), self._window(checkpoint)
        (every,) = held_out_batches(
            self.data, load_tokenizer(words), length=length, batch_size=self.samples, batches=1, seed=seed
        )
        starts = range(0, self.samples, self.batch_size)
        return [
            {key: rows[start : start + self.batch_size] for key, rows in every.items()} for start in starts
        ]

    def _window(self, checkpoint: Checkpoint) -> int:
        """Tokens of a window."""
        if self.length is None:
            return window_length(checkpoint.config)
        text = checkpoint.config.get("text_config") or checkpoint.config
        positions = text.get("max_position_embeddings") or text.get("n_positions")
        if self.needs_data and positions and self.length > positions:
            raise InputError(
                f"length: {self.length} tokens, and {checkpoint.name} was made for {positions} positions"
            )
        return self.length

    @property
    def _first_masks(self) -> Path | None:
        """The file of masks that the learning begins with, where `init` names one."""
        return self.method.masks if isinstance(self.method, MaskProConfig) else None

    @property
    def needs_data(self) -> bool:
        """Magnitude looks at weights alone."""
        return self.method.statistics != "none" or isinstance(self.method, MaskProConfig)

    def check_data(self) -> None:
        """Raise `InputError` where data are needed and nothing names any."""
        if self.needs_data and self.data is None:
            raise InputError(
                f"data: {self.method.kind} needs text to calibrate on, and nothing says what `{self.model}` "
                "was trained on; name tasks or a file"
            )
