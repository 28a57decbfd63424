"""The header of one safetensors file, parsed and checked before any weight is read.

A file is eight bytes of header length (little endian), a JSON object, and the data. The checks are those of
the reference implementation, and every byte of data must belong to exactly one tensor: a torn download, a
file with bytes left over and a header that lies are all found here, each as one line that names the file.

Source  The format's description in github.com/huggingface/safetensors (README, `safetensors/src/tensor.rs`).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import CheckpointError, nearest
from weightsmith.tensors.floats import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit; a longer header is an attack or a torn file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype as safetensors writes it: "BF16", "F32", ...
        shape: Its shape; () for a scalar.
        file: The file that holds it.
        begin: Offset of its first byte from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return (self.numel * DTYPE_BITS[self.dtype] + 7) // 8


def read_header(descriptor: int, file: Path) -> dict[str, TensorInfo]:
    """The tensors of an open safetensors file, in the order of their data.

    Args:
        descriptor: The file, open for reading; its position is not used.
        file: Its path, for messages and for the result.

    Raises:
        CheckpointError: the file is truncated or over-long, or its header is not what the format asks for.
    """
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise CheckpointError(f"{file}: truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file: header of {length} bytes, at most {MAX_HEADER_BYTES} expected"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated: the header alone needs {8 + length} bytes, the file has {size}"
        )
    entries = _parse(_read_exactly(descriptor, length), file)
    tensors = [_tensor(name, entry, file, 8 + length) for name, entry in entries.items()]
    _check_coverage(tensors, file, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _read_exactly(descriptor: int, length: int) -> bytes:
    parts, done = [], 0
    while done < length:
        part = os.pread(descriptor, length - done, 8 + done)
        if not part:
            break  # the file shrank after fstat; the parser reports what is left
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _parse(data: bytes, file: Path) -> dict[str, Any]:
    """The header's JSON without `__metadata__`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{file}: header names `{name}` twice")
            found[name] = value
        return found

    if not data.startswith(b"{"):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not a JSON object")
    try:
        entries = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file}: header is not valid JSON: {str(problem)[:120]}") from problem
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: `__metadata__` of the header must map strings to strings")
    return entries


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    where = f"{file}: tensor `{name}`"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(f"{where}: header entry has {found}; expected dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}{nearest(str(dtype), DTYPE_BITS)}")
    if not _counts(shape):
        raise CheckpointError(f"{where}: shape {_brief(shape)} is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_brief(offsets)} is not [begin, end]")
    info = TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0])
    if (info.numel * DTYPE_BITS[dtype]) % 8:
        raise CheckpointError(f"{where}: {info.numel} elements of {dtype} do not fill whole bytes")
    if info.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} needs {info.nbytes} bytes, its data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return info


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_coverage(tensors: list[TensorInfo], file: Path, data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor. Sorts `tensors` by their data."""
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.begin != end:
            what = "overlaps" if tensor.begin < end else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor `{tensor.name}` begins at byte {tensor.begin} and {what} {before}, "
                f"which ends at {end}"
            )
        end, before = tensor.begin + tensor.nbytes, f"`{tensor.name}`"
    if end > size:
        raise CheckpointError(f"{file}: truncated: the header promises {end} bytes, the file has {size}")
    if end < size:
        raise CheckpointError(f"{file}: over-long: the header promises {end} bytes, the file has {size}")
