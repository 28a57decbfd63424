"""A PEFT adapter on top of its base, seen as the checkpoint it stands for: W + s B A is made tile by tile.

Only the two factors of the tensor being read are in memory, once per thread. The sum is made in float32
from the stored values of W, A and B and not rounded, so it is closer to the exact one than
`merge_and_unload`, which rounds to the model's dtype. Rows are computed in groups that begin at multiples
of 16, so that a tile's values do not depend on where the tile begins.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import folder as folders
from weightsmith.checkpoints.header import TensorInfo
from weightsmith.checkpoints.lora import Adapter, Change, check_kind, read_adapter
from weightsmith.checkpoints.reader import Checkpoint
from weightsmith.errors import CheckpointError
from weightsmith.tensors.floats import BLOCK, DTYPE_BYTES, from_float32

_GROUP = 16


def open_adapter(
    folder: Path, name: str, base: str | Path | Checkpoint | None, *, offline: bool = False
) -> AdapterCheckpoint:
    """Open the adapter in `folder` on top of `base`, or of the base its config names.

    Raises:
        CheckpointError: the adapter is of a kind that is refused, is damaged, or doesn't fit the base.
    """
    config = folders.read_object(folder / folders.ADAPTER_CONFIG)
    check_kind(config, folder)
    weights = folder / folders.ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            f"{weights}: missing; expected the adapter's weights as safetensors (pickle is refused: load the "
            "adapter with peft and save it again)"
        )
    below = base if isinstance(base, Checkpoint) else _open_base(folder, config, base, offline)
    files = None
    try:
        files = folders.OpenFiles([weights])
        adapter = read_adapter(config, files.tensors, below.tensors, below.tied, below.config, folder)
        opened = AdapterCheckpoint(folder, name, below, adapter, files, owns_base=below is not base)
        opened.check_replacements(bool(config.get("ensure_weight_tying")))
    except BaseException:
        if files is not None:
            files.close()
        if below is not base:
            below.close()
        raise
    return opened


class AdapterCheckpoint(Checkpoint):
    """The map of a base with an adapter's changes; made by `Checkpoint.open`.

    `tensors` tells where the base's values lie, and where the adapter's do for tensors that it replaces as
    a whole; only `read` and `read_raw` give the adapted values.

    Attributes:
        base: The base checkpoint.
        changed: Stored names whose values are not those of the plain model at the bottom.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        base: Checkpoint,
        adapter: Adapter,
        files: folders.OpenFiles,
        *,
        owns_base: bool,
    ) -> None:
        self.base = base
        self._owns_base = owns_base
        self._adapter = adapter
        self._local = threading.local()
        self._own = Checkpoint(
            folder,
            name,
            config={},
            side_files={},
            files=files,
            tensors=files.tensors,
            descriptors=files.descriptors,
        )
        own_side_files = folders.side_files(folder)
        own_side_files.pop("config.json", None)
        replaced: dict[str, TensorInfo] = {}
        for stored, names in adapter.replacements.items():
            info = files.tensors[names[0]]
            replaced[stored] = TensorInfo(stored, info.dtype, info.shape, info.file, info.begin)
        super().__init__(
            folder,
            name,
            config=_with_rows(base, replaced),
            side_files=base.side_file_map() | own_side_files,
            files=files,
            tensors={**base.tensors, **replaced},
            descriptors=base.descriptors() | files.descriptors,
        )
        self._replaced = set(replaced)
        self.changed: frozenset[str] = frozenset({*replaced, *adapter.changes})
        if isinstance(base, AdapterCheckpoint):
            self.changed |= base.changed
        self.quantized = base.quantized

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of the adapted tensor as float32; see `Checkpoint.read`."""
        stored = self.tied.get(name, name)
        if stored in self._replaced or stored not in self.tensors:
            values = super().read(stored, start, stop, out)
        else:
            values = self.base.read(stored, start, stop, out)
        change = self._adapter.changes.get(stored)
        if change is not None:
            self._add(change, values, start)
        return values

    def read_raw(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of the adapted tensor, rounded to its dtype; see `Checkpoint.read_raw`."""
        stored = self.tied.get(name, name)
        if stored not in self._adapter.changes:
            source = super() if stored in self._replaced or stored not in self.tensors else self.base
            return source.read_raw(stored, start, stop, out)
        info = self.tensors[stored]
        stop = info.numel if stop is None else stop
        size = DTYPE_BYTES[info.dtype]
        raw = np.empty((stop - start) * size, np.uint8) if out is None else out
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            cast = from_float32(self.read(stored, first, last), info.dtype)
            raw[(first - start) * size : (last - start) * size] = cast.view(np.uint8)
        return raw

    def stores(self, name: str) -> bool:
        """Whether the adapter leaves tensor `name` alone, or replaces it; see `Checkpoint.stores`."""
        return super().stores(name) and self.tied.get(name, name) not in self._adapter.changes

    def fingerprint(self, *, full: bool = False) -> str:
        """Equal for equal base, factors and scales; never equal to that of a plain checkpoint."""
        digest = hashlib.blake2b(digest_size=16)
        changes: dict[str, Any] = {
            name: [change.a, change.b, change.scale, change.transposed]
            for name, change in self._adapter.changes.items()
        }
        parts = [self.base.fingerprint(full=full), self._own.fingerprint(full=full), changes]
        digest.update(json.dumps(["adapter", *parts, self._adapter.replacements], sort_keys=True).encode())
        return ("full:" if full else "quick:") + digest.hexdigest()

    def descriptors(self) -> dict[Path, int]:
        """The open files, the base's included."""
        return self.base.descriptors() | super().descriptors()

    def close(self) -> None:
        """Close the adapter's files, and the base's unless it was handed in open."""
        super().close()
        self._own.close()
        if self._owns_base:
            self.base.close()

    @property
    def plain(self) -> Checkpoint:
        """The model at the bottom, under this adapter and those it stands on."""
        return self.base.plain if isinstance(self.base, AdapterCheckpoint) else self.base

    @property
    def adapter_parameters(self) -> int:
        """Number of elements the adapter itself stores."""
        return sum(info.numel for info in self._own.tensors.values())

    def check_replacements(self, ensure_weight_tying: bool) -> None:
        """A tensor that modules of the base share must be replaced for all of them, by the same values.

        Raises:
            CheckpointError: it isn't.
        """
        for stored, names in self._adapter.replacements.items():
            for name in names[1:]:
                if not _equal(self._own, names[0], self._own, name):
                    raise CheckpointError(
                        f"{self.path}: `{names[0]}` and `{name}` replace `{stored}` but differ"
                    )
            shared = 1 + list(self.tied.values()).count(stored)
            if len(names) >= shared or ensure_weight_tying or _equal(self._own, names[0], self.base, stored):
                continue
            raise CheckpointError(
                f"{self.path}: `{names[0]}` replaces `{stored}`, which other modules of the base share; "
                "untie the base first, or merge the adapter with peft"
            )

    def _add(self, change: Change, values: np.ndarray, start: int) -> None:
        """Add elements [start, start + values.size) of s B A to `values`."""
        a, b = self._factors(change)
        left, right = (a.T, b.T) if change.transposed else (b, a)
        columns = change.columns
        step = max(_GROUP, BLOCK // columns // _GROUP * _GROUP)
        row, stop = start // columns // _GROUP * _GROUP, start + values.size
        while row * columns < stop:
            end = min(row + step, change.rows)
            first, last = max(start, row * columns), min(stop, end * columns)
            if last > first:
                delta = (left[row:end] @ right).reshape(-1)
                delta *= np.float32(change.scale)
                values[first - start : last - start] += delta[first - row * columns : last - row * columns]
            row = end

    def _factors(self, change: Change) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in) and B (out, r) as float32; this thread's last pair is kept."""
        if getattr(self._local, "change", None) != change:
            a, b = self._own.read(change.a), self._own.read(change.b)
            self._local.pair = a.reshape(change.rank, -1), b.reshape(-1, change.rank)
            self._local.change = change
        return self._local.pair


def _open_base(folder: Path, config: dict[str, Any], base: str | Path | None, offline: bool) -> Checkpoint:
    source = base if base is not None else config.get("base_model_name_or_path")
    if not source:
        raise CheckpointError(f"{folder}: an adapter whose config names no base model; name it as `base`")
    if base is None and config.get("revision") and not Path(source).exists():
        source = f"{source}@{config['revision']}"
    if Path(source).is_dir() and Path(source).resolve() == folder.resolve():
        raise CheckpointError(
            f"{folder}: an adapter that names itself as its base model; name another as `base`"
        )
    try:
        return Checkpoint.open(source, offline=offline)
    except CheckpointError as problem:
        raise CheckpointError(
            f"{folder}: adapter without its base model: {problem}; name it as `base`"
        ) from problem


def _with_rows(base: Checkpoint, replaced: dict[str, TensorInfo]) -> dict[str, Any]:
    """The base's config with the number of rows that the adapter's own embeddings have."""
    rows = {info.shape[0] for name, info in replaced.items() if info.shape != base.tensors[name].shape}
    if not rows:
        return base.config
    config = dict(base.config)
    for key, part in (("", config), ("text_config", config.get("text_config"))):
        if isinstance(part, dict) and part.get("vocab_size") is not None:
            changed = {**part, "vocab_size": min(rows)}
            config.update({key: changed} if key else changed)
    return config


def _equal(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    """Whether two tensors of one size hold the same values."""
    numel = one.tensors[name].numel
    return numel == other.tensors[other_name].numel and all(
        np.array_equal(
            one.read(name, start, min(start + BLOCK, numel)),
            other.read(other_name, start, min(start + BLOCK, numel)),
        )
        for start in range(0, numel, BLOCK)
    )
