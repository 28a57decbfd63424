"""2:4 matrices for sparse tensor cores: torch's semi-structured tensors on a CUDA device.

    library      type                 rows and columns must divide by
    CUTLASS      float16, bfloat16    32, 64
                 float32              32, 32
    cuSPARSELt   float16, bfloat16    16, 16

Source  torch.sparse.semi_structured of torch 2.13. Serving engines have dropped the format; a dense
        checkpoint with zeros is what they load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from weightsmith.compression.nm.oneshot import Mask
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.errors import InputError

Library = Literal["cutlass", "cusparselt"]
_MULTIPLES: Mapping[Library, Mapping[torch.dtype, tuple[int, int]]] = {
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)},
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16)},
}
KINDS: Mapping[Library, type[SparseSemiStructuredTensor]] = {
    "cutlass": SparseSemiStructuredTensorCUTLASS,
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
}


def check_semi_structured(name: str, weight: Tensor, mask: Mask, library: Library) -> None:
    """Whether a matrix can be packed; needs no GPU.

    Raises:
        InputError: a pattern, axis, type or shape that the library doesn't take; says the needed multiple.
    """
    check_layout(name, tuple(weight.shape), weight.dtype, mask.pattern, mask.dim, library)


def check_layout(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, pattern: Pattern, dim: int, library: Library
) -> None:
    """The same of a matrix that is not there yet."""
    if pattern != Pattern(2, 4) or len(shape) != 2 or dim % len(shape) != len(shape) - 1:
        raise InputError(
            f"{name}: semi-structured matrices are 2:4 along the last axis of (outputs, inputs), this one is "
            f"{pattern} along axis {dim} of {list(shape)}"
        )
    multiples = _MULTIPLES[library].get(dtype)
    if multiples is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _MULTIPLES[library])
        raise InputError(f"{name}: {library} packs {known}, the weight is {dtype}")
    if any(size % multiple for size, multiple in zip(shape, multiples, strict=True)):
        raise InputError(
            f"{name}: {library} needs rows in multiples of {multiples[0]} and columns of {multiples[1]} for "
            f"{str(dtype).removeprefix('torch.')}, the weight is {list(shape)}"
        )


def sparse_library() -> Library:
    """What this machine multiplies 2:4 matrices with.

    Raises:
        InputError: it has no CUDA device, or one without sparse tensor cores.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "semi-structured matrices need a CUDA device, this machine has none; the dense checkpoint with "
            "zeros runs anywhere. Nothing was written."
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise InputError(
            f"{torch.cuda.get_device_name()}: has no sparse tensor cores (compute capability "
            f"{capability[0]}.{capability[1]}, expected 8.0 or more). Nothing was written."
        )
    return "cusparselt" if torch.backends.cusparselt.is_available() else "cutlass"


def packed(weight: Tensor, library: Library) -> SparseSemiStructuredTensor:
    """A matrix with at least two zeros in each four, for sparse tensor cores.

    `torch.sparse.to_sparse_semi_structured` takes cuSPARSELt also where torch was built without it.
    """
    return KINDS[library].from_dense(weight.detach().contiguous())


def to_semi_structured_(model: nn.Module, masks: Mapping[str, Mask]) -> nn.Module:
    """Pack the masked weights of a model's linear layers, in place; forward passes then run sparse.

    Args:
        model: On a CUDA device, pruned.
        masks: By parameter's name.

    Raises:
        InputError: the model is not on CUDA; a weight can't be packed, or is not 0 where its mask is false.
            Nothing is packed then.
    """
    parameters = dict(model.named_parameters())
    absent = [name for name in masks if name not in parameters]
    if absent:
        raise InputError(f"{absent[0]}: the model has no such parameter")
    for name in masks:
        if parameters[name].device.type != "cuda":
            raise InputError(
                f"{name}: is on {parameters[name].device}; sparse tensor cores need a CUDA device. The dense "
                "checkpoint with zeros runs anywhere"
            )
    library = sparse_library()
    for name, mask in masks.items():
        check_semi_structured(name, parameters[name], mask, library)
        if bool((parameters[name].ne(0) & ~mask.kept.to(parameters[name].device)).any()):
            raise InputError(f"{name}: has weights that its mask drops; apply the masks first")
    for name in masks:
        put(model, name, packed(parameters[name], library))
    return model


def put(model: nn.Module, name: str, weight: Tensor) -> None:
    """A packed matrix in the place of a model's parameter."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
