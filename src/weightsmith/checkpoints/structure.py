"""What is in a checkpoint, for `weightsmith inspect`: from headers alone, and from the weights on request.

Norms are computed tile by tile in float64 with numpy. Spectra need torch and one whole matrix at a time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints.adapter import AdapterCheckpoint
from weightsmith.checkpoints.header import TensorInfo
from weightsmith.checkpoints.names import layer_index
from weightsmith.checkpoints.reader import Checkpoint
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.tensors.floats import BLOCK, FLOAT_DTYPES

TOP_VALUES = 8
"""Singular values shown per matrix."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Size of a tensor's or block's values.

    Attributes:
        norm: Euclidean norm of the finite values.
        rms: Root of the mean square of the finite values.
        largest: Largest magnitude of a finite value.
        not_finite: Number of NaN and infinities.
    """

    norm: float
    rms: float
    largest: float
    not_finite: int


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        top: The largest ones, in descending order.
        stable_rank: Squared Frobenius norm over squared largest singular value.
    """

    top: tuple[float, ...]
    stable_rank: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer, or one module outside the layers.

    Attributes:
        name: Common part of its tensors' names: "model.layers.3", "model.embed_tokens".
        layer: Its number; None outside the layers.
        tensors: Number of tensors.
        parameters: Number of elements.
        nbytes: Bytes in the files.
        dtypes: Their dtypes.
        norms: On request.
    """

    name: str
    layer: int | None
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    norms: Norms | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint at a glance.

    Attributes:
        name: The folder's name or hub id.
        architecture: First of `architectures` in config.json; None when it names none.
        model_type: `model_type` of config.json.
        parameters: Elements of all stored tensors; tied ones count once.
        trainable: Elements that were trained: an adapter's own, or all float ones of a model.
        dtypes: dtype -> number of elements.
        blocks: Layers and other modules, in the order of their names with numbers counted.
        tied: Absent name -> stored name.
        shards: File name -> bytes.
        weight_bytes: Bytes of the weight files.
        disk_bytes: Bytes of all files in the folder.
        quantized: Why the weights are not plain numbers, or "".
        method: What made it, from its lineage.
        norms: Tensor name -> its norms, on request.
        spectra: Matrix name -> its spectrum, on request.
    """

    name: str
    architecture: str | None
    model_type: str | None
    parameters: int
    trainable: int
    dtypes: dict[str, int]
    blocks: tuple[Block, ...]
    tied: dict[str, str]
    shards: dict[str, int]
    weight_bytes: int
    disk_bytes: int
    quantized: str
    method: str | None
    norms: dict[str, Norms] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def summarise(
    source: str | Path | Checkpoint,
    *,
    norms: bool = False,
    spectra: bool = False,
    progress: Progress = SILENT,
) -> Summary:
    """Summarise a checkpoint.

    Args:
        source: A folder, a hub id, an adapter folder, or an open checkpoint.
        norms: Read all weights and give norms per tensor and block.
        spectra: Read all matrices and give their largest singular values; needs torch.
        progress: Told how many elements have been read.

    Raises:
        CheckpointError: it is not a sound checkpoint.
    """
    if not isinstance(source, Checkpoint):
        with Checkpoint.open(source) as opened:
            return summarise(opened, norms=norms, spectra=spectra, progress=progress)
    checkpoint = source
    sums = _all_sums(checkpoint, progress) if norms else {}
    architectures = checkpoint.config.get("architectures") or [None]
    lineage = checkpoint.lineage
    files = {file.name: file.stat().st_size for file in sorted(checkpoint.descriptors())}
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.numel
    return Summary(
        name=checkpoint.name,
        architecture=architectures[0],
        model_type=checkpoint.config.get("model_type"),
        parameters=sum(dtypes.values()),
        trainable=_trainable(checkpoint),
        dtypes=dtypes,
        blocks=tuple(
            _block(name, group, sums) for name, group in _groups(checkpoint.tensors.values()).items()
        ),
        tied=dict(checkpoint.tied),
        shards=files,
        weight_bytes=sum(files.values()),
        disk_bytes=sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file()),
        quantized=checkpoint.quantized,
        method=lineage.method if lineage else None,
        norms={name: parts.norms() for name, parts in sums.items()},
        spectra=_spectra(checkpoint, progress) if spectra else {},
    )


@dataclass(slots=True)
class _Sums:
    """What norms are made of, of one tensor or several."""

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    def take(self, tile: np.ndarray) -> None:
        """Add float32 values."""
        values = tile.astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            self.not_finite += values.size - int(np.count_nonzero(finite))
            values = values[finite]
        self.count += values.size
        if values.size:
            self.squares += float(np.dot(values, values))
            self.largest = max(self.largest, float(values.max()), -float(values.min()))

    def merge(self, other: _Sums) -> None:
        """Add another's values."""
        self.count += other.count
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)
        self.not_finite += other.not_finite

    def norms(self) -> Norms:
        """The norms so far."""
        return Norms(
            norm=math.sqrt(self.squares),
            rms=math.sqrt(self.squares / self.count) if self.count else 0.0,
            largest=self.largest,
            not_finite=self.not_finite,
        )


def _all_sums(checkpoint: Checkpoint, progress: Progress) -> dict[str, _Sums]:
    floats = {name: info for name, info in checkpoint.tensors.items() if info.dtype in FLOAT_DTYPES}
    progress.start("norms", sum(info.numel for info in floats.values()), "elements")
    buffer = np.empty(BLOCK, np.float32)
    sums: dict[str, _Sums] = {}
    for name, info in floats.items():
        sums[name] = _Sums()
        for start in range(0, info.numel, BLOCK):
            stop = min(start + BLOCK, info.numel)
            sums[name].take(checkpoint.read(name, start, stop, buffer[: stop - start]))
            progress.advance(stop - start)
    progress.done()
    return sums


def _spectra(checkpoint: Checkpoint, progress: Progress) -> dict[str, Spectrum]:
    import torch

    from weightsmith.tensors.spectra import singular_values

    matrices = {
        name: info
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2 and min(info.shape) > 1 and info.dtype in FLOAT_DTYPES
    }
    progress.start("spectra", sum(info.numel for info in matrices.values()), "elements")
    spectra: dict[str, Spectrum] = {}
    for name, info in matrices.items():
        matrix = torch.from_numpy(checkpoint.read(name)).reshape(info.shape)
        if bool(torch.isfinite(matrix).all()):
            values = singular_values(matrix).double()
            largest = float(values[0])
            rank = float(values.square().sum()) / largest**2 if largest > 0 else 0.0
            spectra[name] = Spectrum(top=tuple(values[:TOP_VALUES].tolist()), stable_rank=rank)
        else:  # a matrix with NaN has no singular values
            spectra[name] = Spectrum(top=(), stable_rank=math.nan)
        progress.advance(info.numel)
    progress.done()
    return spectra


def _trainable(checkpoint: Checkpoint) -> int:
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.adapter_parameters
    return sum(info.numel for info in checkpoint.tensors.values() if info.dtype in FLOAT_DTYPES)


def _groups(tensors: Iterable[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Tensors by block, blocks in natural order."""
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        groups.setdefault(_block_name(info.name), []).append(info)
    return {name: groups[name] for name in sorted(groups, key=_natural)}


def _block_name(name: str) -> str:
    """Up to the layer's number, or the module that holds the tensor."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return match.group(0) if match else name.rpartition(".")[0] or name


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _block(name: str, tensors: list[TensorInfo], sums: dict[str, _Sums]) -> Block:
    total = _Sums()
    for info in tensors:
        if info.name in sums:
            total.merge(sums[info.name])
    return Block(
        name=name,
        layer=layer_index(name),
        tensors=len(tensors),
        parameters=sum(info.numel for info in tensors),
        nbytes=sum(info.nbytes for info in tensors),
        dtypes=tuple(sorted({info.dtype for info in tensors})),
        norms=total.norms() if sums else None,
    )
