"""Packed 2:4 matrices in files, beside the dense checkpoint that they are of.

    weightsmith/semi_structured.safetensors   {parameter}.packed, and {parameter}.meta where the library keeps
                                              positions apart
    weightsmith/semi_structured.json          which library and version, and each matrix's shape

Torch can save its semi-structured tensors by pickle alone, and safetensors refuses them; what they are made
of is plain tensors. CUTLASS's layout is one for all GPUs that it runs on; cuSPARSELt's is its own business
and may change with its version or the GPU. So a file is read back only by the library and on the kind of GPU
that wrote it; anywhere else the dense matrices are packed again, which gives the same model.

Source  torch.sparse.semi_structured of torch 2.13: `__tensor_flatten__` and the classes' constructors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightsmith.checkpoints import Checkpoint, TensorSpec
from weightsmith.compression.nm.files import read_masks
from weightsmith.compression.nm.oneshot import Masks
from weightsmith.compression.nm.options import PACKED_FACTS, PACKED_FILE, NMOptions
from weightsmith.compression.nm.semi_structured import (
    KINDS,
    Library,
    check_layout,
    packed,
    put,
    sparse_library,
    to_semi_structured_,
)
from weightsmith.compression.nm.stored import stored_parts
from weightsmith.compression.nm.targets import Target
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.atomic import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT = 1
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {
    torch.int16: "I16",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_TOLERANCE = 1e-2
"""Of a product with the identity, relative to the largest weight: float32 goes through TF32."""


@dataclass(frozen=True)
class PackedMatrices:
    """Matrices packed for one library, on the CPU.

    Attributes:
        facts: The content of the JSON file.
        tensors: By name in the file of tensors.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def specs(self) -> list[TensorSpec]:
        """What a writer has to lay out."""
        return [TensorSpec(name, _NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()]

    def raw(self) -> Iterator[tuple[str, np.ndarray]]:
        """The bytes of each tensor."""
        for name, one in self.tensors.items():
            yield name, one.contiguous().reshape(-1).view(torch.uint8).numpy()

    def facts_bytes(self) -> bytes:
        """The JSON file."""
        return json.dumps(self.facts, indent=1, sort_keys=True).encode()


def check_targets(targets: list[Target], source: Checkpoint, options: NMOptions) -> Library:
    """Whether everything that is to be pruned can be packed here, before it is.

    Raises:
        InputError: no CUDA device; a pattern, axis, type or shape that can't be packed.
    """
    library = sparse_library()
    parts = stored_parts(source, {target.name: target.parameter.to("meta") for target in targets})
    for target in targets:
        stored, *more = parts[target.name]
        dtype = source.tensors[stored].dtype
        if more or dtype not in _DTYPES:
            found = f"{1 + len(more)} tensors" if more else dtype
            raise InputError(f"{target.name}: is stored as {found}, {library} can't pack it")
        check_layout(target.name, target.shape, _DTYPES[dtype], options.nm, target.dim, library)
    return library


def pack(weights: Iterator[tuple[str, str, np.ndarray]], masks: Masks, library: Library) -> PackedMatrices:
    """Pack matrices as they are stored, and see that this machine multiplies by them.

    Args:
        weights: Name, stored type and bytes of each.
        masks: Of the same names.
        library: Of this machine.

    Raises:
        InputError: a product is not the matrix's.
    """
    matrices: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    device = _device()
    for name, dtype, raw in weights:
        shape = tuple(masks[name].kept.shape)
        weight = torch.from_numpy(np.ascontiguousarray(raw)).view(_DTYPES[dtype]).reshape(shape).to(device)
        made = packed(weight, library)
        _check_product(name, made, weight)
        for field in ("packed", "meta"):
            if (part := getattr(made, field)) is not None:
                tensors[f"{name}.{field}"] = part.cpu()
        matrices[name] = list(shape)
    return PackedMatrices({"format": FORMAT, **_stamp(library), "matrices": matrices}, tensors)


def load_semi_structured(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder that was pruned 2:4, on the CUDA device, its pruned matrices packed.

    Args:
        folder: Written with `export="semi-structured"`, or any checkpoint with 2:4 masks beside it.

    Returns:
        The model, in evaluation mode and of the stored type, and its tokenizer.

    Raises:
        CheckpointError: no such folder, no masks in it, or a damaged file.
        InputError: no CUDA device; matrices that can't be packed.
    """
    from weightsmith.evaluation.models import load_model

    library, path = sparse_library(), Path(folder).expanduser()
    masks = read_masks(path)
    with Checkpoint.open(path) as checkpoint:
        parts = stored_parts(checkpoint, {name: mask.kept for name, mask in masks.items()})
        stored = {checkpoint.tensors[key].dtype for of_one in parts.values() for key in of_one}
    if len(stored) != 1 or not stored <= _DTYPES.keys():
        raise InputError(f"{folder}: pruned matrices are stored as {', '.join(sorted(stored)) or 'nothing'}")
    dtype = str(_DTYPES[stored.pop()]).removeprefix("torch.")
    facts = read_json(path / PACKED_FACTS) if (path / PACKED_FACTS).is_file() else {}
    if {key: facts.get(key) for key in _stamp(library)} != _stamp(library):
        if facts:
            log.info("%s: was packed by %s elsewhere; packing it again", folder, facts.get("library"))
        model, tokenizer = load_model(path, device=str(_device()), dtype=dtype)
        to_semi_structured_(model, masks)
        return model, tokenizer
    model, tokenizer = load_model(path, device="cpu", dtype=dtype)
    _place(model, path / PACKED_FILE, facts["matrices"], library)
    return model, tokenizer


def _place(model: nn.Module, file: Path, matrices: Mapping[str, Any], library: Library) -> None:
    """Put packed matrices in their places and everything else beside them: none is there as a dense one."""
    device = _device()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for name, parameter in model.named_parameters():
        if name not in matrices:
            parameter.data = parameter.data.to(device)
    try:
        with safe_open(str(file), framework="pt", device=str(device)) as stored:
            keys = set(stored.keys())
            for name, shape in matrices.items():
                parts: dict[str, Any] = {
                    field: stored.get_tensor(f"{name}.{field}") if f"{name}.{field}" in keys else None
                    for field in ("packed", "meta")
                }
                absent: dict[str, Any] = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
                put(model, name, KINDS[library](torch.Size(shape), **parts, **absent))
    except (SafetensorError, OSError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"{file}: damaged packed matrices: {problem}") from problem


def _check_product(name: str, made: Any, weight: Tensor) -> None:
    """The library's product with the identity is the matrix itself."""
    try:
        product = torch.mm(made, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
    except RuntimeError as problem:
        first = str(problem).strip().partition("\n")[0]
        raise InputError(
            f"{name}: this GPU can't multiply by it ({first}). Nothing was written."
        ) from problem
    worst = float((product - weight).abs().max())
    if not worst <= _TOLERANCE * float(weight.abs().max()):
        raise InputError(f"{name}: its packed product is off by {worst:.3g}. Nothing was written.")


def _stamp(library: Library) -> dict[str, Any]:
    """What a packed layout depends on."""
    if library == "cutlass":
        return {"library": library}
    return {
        "library": library,
        "version": torch.backends.cusparselt.version(),
        "capability": list(torch.cuda.get_device_capability()),
    }


def _device() -> torch.device:
    return torch.device("cuda")
