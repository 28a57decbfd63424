"""A checkpoint folder as a lazy map from names to tensors.

Reading  One `pread` into the caller's array (float32), or into a scratch block of the thread and one cast
         from there (bfloat16, float16). Never mmap: mapped pages count as resident memory and a full disk
         turns into a signal.
Threads  All methods may be called from several threads at once.
Cost     Opening reads headers only. Reading costs 0.3 ns per bfloat16 element from a warm page cache, a few
         microseconds per call, and no memory beyond the scratch block.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from weightsmith.checkpoints import folder as folders
from weightsmith.checkpoints.header import TensorInfo
from weightsmith.checkpoints.names import tied_names
from weightsmith.errors import CheckpointError, SystemFault, nearest
from weightsmith.runs.atomic import system_faults
from weightsmith.tensors.floats import BLOCK, DTYPE_BITS, FLOAT_DTYPES, storage_dtype, to_float32

if TYPE_CHECKING:
    from weightsmith.checkpoints.lineage import Lineage

_PLAIN = frozenset(FLOAT_DTYPES)

Place = tuple[int, int, int, int, str]
"""Of one tensor: descriptor, first byte, bits per element, elements, dtype."""


class _Scratch(threading.local):
    """One block of stored bytes per thread."""

    def __init__(self) -> None:
        self.raw = np.empty(2 * BLOCK, np.uint8)


_scratch = _Scratch()


class Checkpoint:
    """A model in the Hugging Face layout, read lazily. Make one with `Checkpoint.open`.

    Attributes:
        path: The folder.
        name: What to call it in messages and labels: the folder's name or the hub id.
        config: Its config.json; empty when there is none.
        tensors: The stored tensors by name, sorted.
        tied: Names absent from the files -> the stored tensor that a loader uses for them.
        quantized: Why the weights are not plain numbers (a sentence), or an empty string when they are.
            Such a checkpoint can be listed and copied, not merged.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        config: dict[str, Any],
        side_files: Mapping[str, Path],
        files: folders.OpenFiles,
        tensors: Mapping[str, TensorInfo],
        descriptors: Mapping[Path, int],
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.tensors: dict[str, TensorInfo] = dict(sorted(tensors.items()))
        self.tied: dict[str, str] = tied_names(self.tensors.keys(), config)
        self.quantized: str = _quantized(config, self.tensors)
        self._side_files = dict(sorted(side_files.items()))
        self._files = files
        # What a read needs, in one look-up.
        self._places = {info.name: place_of(info, descriptors) for info in self.tensors.values()}

    @classmethod
    def open(
        cls, source: str | Path, *, base: str | Path | Checkpoint | None = None, offline: bool = False
    ) -> Checkpoint:
        """Open a model folder, a hub model, or a PEFT adapter on top of its base.

        Args:
            source: A folder or a hub id (`owner/name`, `owner/name@revision`), or `model+adapter`.
            base: For an adapter, the model it belongs to, instead of the one its config names. A checkpoint
                given here stays the caller's to close.
            offline: Never ask the hub, use its local cache only.

        Raises:
            CheckpointError: it can't be had, or it is not a sound checkpoint; one line that says what is
                wrong.
            SystemFault: the machine refused to read it.
        """
        below, plus, adapter = str(source).rpartition("+")
        if plus and not Path(source).expanduser().exists():
            opened = cls.open(adapter, base=below, offline=offline)
            opened.check_adapter(str(source))
            return opened
        folder, name = folders.resolve(source, offline=offline)
        with system_faults(folder):
            if folders.is_adapter(folder):
                from weightsmith.checkpoints.adapter import open_adapter

                return open_adapter(folder, name, base, offline=offline)
            values = folders.read_config(folder)
            side_files = folders.side_files(folder)
            files = folders.open_weights(folder)
        return Checkpoint(
            folder,
            name,
            config=values,
            side_files=side_files,
            files=files,
            tensors=files.tensors,
            descriptors=files.descriptors,
        )

    def check_adapter(self, source: str) -> None:
        """Refuse what stands behind a `+` and is no adapter; closes it then.

        Raises:
            CheckpointError: it is a whole model, and what it was to be put on has no part in it.
        """
        if not folders.is_adapter(self.path):
            self.close()
            raise CheckpointError(
                f"{source}: {self.name} is a whole model, expected an adapter behind the `+`"
            )

    @property
    def side_files(self) -> tuple[Path, ...]:
        """The files that a copy carries over, sorted by name: never weights, pickle, or our lineage."""
        return tuple(self._side_files.values())

    def side_file_map(self) -> dict[str, Path]:
        """The side files by the name they have inside the folder: what `CheckpointWriter` takes."""
        return dict(self._side_files)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor `name`, as float32.

        Args:
            name: A stored name or a tied one.
            start: First element.
            stop: One past the last element; the tensor's end when None.
            out: Contiguous 1-D float32 array of `stop - start` elements to fill.

        Returns:
            `out`, or a new 1-D array. Tensors that are no plain floats come as they are stored: integers in
            their own type, one-byte floats as uint8 (`out` must then be of that type).

        Raises:
            CheckpointError: no such tensor; the file ends too early.
            SystemFault: the machine failed to read.
        """
        place = self._places.get(name) or self._place(name)
        descriptor, begin, bits, numel, dtype = place
        if stop is None:
            stop = numel
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {numel}")
        if dtype == "F32" or dtype not in _PLAIN:
            if bits < 8:
                return self.read_raw(name, start, stop, out)
            if out is None:
                out = np.empty(stop - start, storage_dtype(dtype))
            _check_out(out, stop - start, storage_dtype(dtype))
            self._fill(out, descriptor, begin + start * (bits >> 3), name)
            return out
        if out is None:
            out = np.empty(stop - start, np.float32)
        _check_out(out, stop - start, _FLOAT32)
        size = bits >> 3
        step = 2 * BLOCK // size
        for first in range(start, stop, step):
            count = min(step, stop - first)
            raw = _scratch.raw[: count * size]
            self._fill(raw, descriptor, begin + first * size, name)
            to_float32(raw, dtype, out[first - start : first - start + count])
        return out

    def read_raw(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The stored bytes of elements [start, stop) of tensor `name`, unconverted.

        Args:
            name: A stored name or a tied one.
            start: First element.
            stop: One past the last element; the tensor's end when None.
            out: Contiguous 1-D uint8 array to fill.

        Returns:
            `out`, or a new 1-D uint8 array.

        Raises:
            CheckpointError: no such tensor; the file ends too early.
            SystemFault: the machine failed to read.
        """
        descriptor, begin, bits, numel, _ = self._places.get(name) or self._place(name)
        if stop is None:
            stop = numel
        if not 0 <= start <= stop <= numel or start * bits % 8 or stop * bits % 8:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {numel}")
        size = (stop - start) * bits // 8
        if out is None:
            out = np.empty(size, np.uint8)
        _check_out(out, size, _BYTE)
        self._fill(out, descriptor, begin + start * bits // 8, name)
        return out

    def stores(self, name: str) -> bool:
        """Whether the stored bytes are all there is to tensor `name`: an adapter's changes are not stored."""
        return name in self.tensors or name in self.tied

    def read_bytes(self, name: str, offset: int, size: int, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes [offset, offset + size) of a stored tensor; `out` may be longer. Raises as `read_raw`."""
        descriptor, begin, *_ = self._places.get(name) or self._place(name)
        raw = np.empty(size, np.uint8) if out is None else out[:size]
        self._fill(raw, descriptor, begin + offset, name)
        return raw

    def read_pieces(self, name: str, offsets: Sequence[int], size: int) -> bytes:
        """`size` bytes of a stored tensor from each of `offsets` on, joined. Raises as `read_raw`."""
        descriptor, begin, *_ = self._places.get(name) or self._place(name)
        with system_faults(self.path):
            pieces = [os.pread(descriptor, size, begin + offset) for offset in offsets]
        for place, offset in enumerate(offsets):
            if len(pieces[place]) < size:  # after a signal, and where the file was cut
                pieces[place] = self.read_bytes(name, offset, size).tobytes()
        return b"".join(pieces)

    def fingerprint(self, *, full: bool = False) -> str:
        """A short text that is equal for equal content, however it is sharded: see `fingerprint.py`.

        Args:
            full: Take in every byte instead of samples.
        """
        from weightsmith.checkpoints.fingerprint import fingerprint

        return fingerprint(self, full=full)

    @property
    def lineage(self) -> Lineage | None:
        """What made this checkpoint, from its weightsmith.json; None when it has none."""
        from weightsmith.checkpoints.lineage import read_lineage

        return read_lineage(self.path)

    def descriptors(self) -> dict[Path, int]:
        """The open files of the stored tensors."""
        return dict(self._files.descriptors)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        self._places = {}
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        """The place of a tied name."""
        stored = self.tied.get(name)
        if stored in self._places:
            return self._places[stored]
        if self.tensors and not self._places:
            raise ValueError(f"{self.name} is closed")
        raise CheckpointError(f"{self.name}: no tensor `{name}`{nearest(name, self.tensors)}")

    def _fill(self, out: np.ndarray, descriptor: int, offset: int, name: str) -> None:
        """Read `out` full from `offset`."""
        try:
            got = os.preadv(descriptor, (out.data,), offset)
            if got == out.nbytes:
                return
            rest = out.data.cast("B")
            while got < out.nbytes:  # past 2 GiB, and after a signal, the kernel reads less than asked
                more = os.preadv(descriptor, (rest[got:],), offset + got)
                if not more:
                    raise CheckpointError(
                        f"{self.path}: the file of tensor `{name}` ended {out.nbytes - got} bytes early: "
                        "it was cut after it was opened"
                    )
                got += more
        except OSError as fault:
            if isinstance(fault, SystemFault):
                raise
            raise SystemFault(f"{self.path}: reading tensor `{name}`: {fault.strerror}") from fault


def place_of(info: TensorInfo, descriptors: Mapping[Path, int]) -> Place:
    """Where a tensor of open files lies."""
    return descriptors[info.file], info.begin, DTYPE_BITS[info.dtype], info.numel, info.dtype


_FLOAT32 = np.dtype(np.float32)
_BYTE = np.dtype(np.uint8)


def _check_out(out: np.ndarray, size: int, dtype: np.dtype) -> None:
    if out.size != size or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be a contiguous {dtype} array of {size}, got {out.dtype} of {out.size}")


def _quantized(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    """Why a checkpoint's weights are not plain numbers, or an empty string."""
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method", "unknown") if isinstance(said, dict) else said
        return f"config.json says quantization_config.quant_method = {method}"
    for info in tensors.values():
        if info.dtype.startswith(("F8_", "F6_", "F4")):
            return f"tensor `{info.name}` is stored as {info.dtype}"
        if info.name.endswith((".qweight", ".weight_packed", ".SCB", ".absmax")):
            return f"tensor `{info.name}` holds packed weights"
    return ""
