"""Where every byte of a checkpoint will lie, decided before the first one is written.

Shards are filled in the given order up to `max_shard_bytes`, as `huggingface_hub` does it; inside a shard
wider dtypes come first, then names in order, as the safetensors library does it. Files are byte for byte
what `safetensors` and `save_pretrained` would write for the same tensors.

Source  huggingface_hub `split_state_dict_into_shards_factory`; safetensors `prepare` in `tensor.rs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.checkpoints.folder import INDEX_FILE, WEIGHTS_FILE
from weightsmith.errors import InputError
from weightsmith.tensors.floats import DTYPE_BITS

_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}

MAX_SHARD_BYTES = 5_000_000_000
"""5 GB: small enough for every hub and file system."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written.

    Attributes:
        file: Its name.
        head: Header length and header, padded.
        offsets: Tensor name -> offset of its first byte from the start of the file.
        size: Bytes of the whole file.
    """

    file: str
    head: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of a checkpoint.

    Attributes:
        specs: The tensors by name, in the given order.
        shards: The files.
        index: Bytes of `model.safetensors.index.json`; None for a single file, which needs none.
    """

    specs: dict[str, TensorSpec]
    shards: tuple[Shard, ...]
    index: bytes | None

    @property
    def total_bytes(self) -> int:
        """Exact size of the weight files and the index together."""
        return sum(shard.size for shard in self.shards) + len(self.index or b"")


def plan_layout(specs: Sequence[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
    """Lay out `specs` in shards of at most `max_shard_bytes` of tensor data (a larger tensor gets its own).

    Raises:
        InputError: no tensors, a name twice, or a dtype that can't be written.
    """
    by_name = {spec.name: spec for spec in specs}
    if not specs:
        raise InputError("no tensors to write")
    if len(by_name) != len(specs):
        names = [spec.name for spec in specs]
        raise InputError(
            f"tensor `{next(name for name in names if names.count(name) > 1)}` is to be written twice"
        )
    for spec in specs:
        if spec.dtype not in DTYPE_BITS:
            raise InputError(f"tensor `{spec.name}`: dtype {spec.dtype!r} is not one of safetensors'")
    groups = _split(specs, max_shard_bytes)
    if len(groups) == 1:
        return Layout(by_name, (_shard(WEIGHTS_FILE, groups[0]),), None)
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    shards = tuple(_shard(file, group) for file, group in zip(files, groups, strict=True))
    index = {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {spec.name: file for file, group in zip(files, groups, strict=True) for spec in group},
    }
    return Layout(by_name, shards, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8"))


def plan_file(file: str, specs: Sequence[TensorSpec]) -> Shard:
    """Lay out one more file of tensors, which is no part of the checkpoint that loaders see.

    Raises:
        InputError: no tensors, a name twice, or a dtype that can't be written.
    """
    plan_layout(specs)
    return _shard(file, specs)


def is_weight_file(name: str) -> bool:
    """Whether a layout could ever use `name`: such names are not free for side files."""
    return name == INDEX_FILE or name.endswith(".safetensors")


def _split(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > limit:
            groups.append([spec])
            continue
        if size + spec.nbytes > limit:
            groups.append(current)
            current, size = [], 0
        current.append(spec)
        size += spec.nbytes
    if current:
        groups.append(current)
    return groups


def _shard(file: str, specs: Sequence[TensorSpec]) -> Shard:
    ordered = sorted(specs, key=lambda spec: (-_RANKS[spec.dtype], spec.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for spec in ordered:
        begins[spec.name] = end
        end += spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begins[spec.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(file, head, {name: len(head) + begin for name, begin in begins.items()}, len(head) + end)
