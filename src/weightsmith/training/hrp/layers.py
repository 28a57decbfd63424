"""LoRA layers of PEFT seen as two factors each, whatever kind of module they sit on.

The product of a layer is left (M x R) times right^T (R x N). A new adapter has a random factor, which sets
the directions, and one that is 0: for all kinds but embeddings right = A and left = B.

    kind        left (M, R)                   right (N, R)          stored as
    linear      lora_B                        lora_A^T              also Conv1D and quantised layers
    conv        lora_B, kernel of 1           lora_A^T, flattened   (R, in * kernel)
    embedding   lora_embedding_A^T (tokens)   lora_embedding_B      PEFT starts A at 0 here
    experts     one pair for each expert      one for each expert   stacked along R
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.sharded import local

PREFIX = "base_model.model."
Kind = Literal["linear", "conv", "embedding", "experts"]


@dataclass(frozen=True)
class Layer:
    """One LoRA layer.

    Attributes:
        name: As PEFT names it in adapter files, without `base_model.model.`.
        module: PEFT's layer.
        kind: How its factors are stored.
        twins: Names of further layers that have the same factors, tied by PEFT, and their modules.
    """

    name: str
    module: Any
    kind: Kind
    twins: dict[str, Any] = field(default_factory=dict)

    def parameters(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The parameters of an adapter that hold left and right."""
        if self.kind == "embedding":
            return self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter]
        return self.module.lora_B[adapter].weight, self.module.lora_A[adapter].weight

    def tie(self, adapter: str) -> None:
        """Give twins its factors, as PEFT does for a first adapter and for no other."""
        for module in self.twins.values():
            left, right = self.parameters(adapter)
            for own, factor in ((module.lora_B[adapter], left), (module.lora_A[adapter], right)):
                own.weight = nn.Parameter(factor.T, requires_grad=factor.requires_grad)

    def left(self, adapter: str) -> Tensor:
        """(E, M, R), E = 1 but for experts."""
        stored = _whole(self.parameters(adapter)[0])
        if self.kind == "embedding":
            return stored.mT[None]
        if self.kind == "experts":
            return stored.reshape(len(stored), -1, self.num_experts).permute(2, 0, 1)
        return stored.flatten(1)[None]

    def right(self, adapter: str) -> Tensor:
        """(E, N, R)."""
        stored = _whole(self.parameters(adapter)[1])
        if self.kind == "embedding":
            return stored[None]
        if self.kind == "experts":
            return stored.reshape(self.num_experts, -1, stored.shape[-1]).mT
        return stored.flatten(1).mT[None]

    @torch.no_grad()
    def write(self, adapter: str, left: Tensor, right: Tensor) -> None:
        """Put (E, M, R) and (E, N, R) where the adapter keeps them, in its dtype and memory; of a sharded one
        each process keeps its part.
        """
        for stored, values in zip(
            self.parameters(adapter), (self._stored_left(left), self._stored_right(right)), strict=True
        ):
            values = values.reshape(stored.shape).to(stored.dtype)
            if _is_sharded(stored):
                from torch.distributed.tensor import distribute_tensor

                values = distribute_tensor(values, stored.device_mesh, stored.placements)  # type: ignore
            stored.data.copy_(values)

    @property
    def sides(self) -> tuple[int, int]:
        """M and N."""
        left, right = (stored.shape for stored in self.parameters(next(iter(self.module.r))))
        if self.kind == "embedding":
            return left[1], right[0]
        return left[0], right[1:].numel()

    def is_sharded(self, adapter: str) -> bool:
        """Whether a process has a part of its factors."""
        return any(_is_sharded(stored) for stored in self.parameters(adapter))

    @property
    def num_experts(self) -> int:
        """How many there are of each factor."""
        return self.module.num_experts if self.kind == "experts" else 1

    def _stored_left(self, left: Tensor) -> Tensor:
        if self.kind == "embedding":
            return left[0].mT
        return left.permute(1, 2, 0) if self.kind == "experts" else left[0]

    def _stored_right(self, right: Tensor) -> Tensor:
        if self.kind == "embedding":
            return right[0]
        return right.mT if self.kind == "experts" else right[0].mT


def find_layers(model: nn.Module, adapter: str) -> tuple[list[Layer], list[str]]:
    """The LoRA layers that have `adapter`, shared factors once; and names of those that can't be read.

    Raises:
        InputError: factors without memory, or in parts that only DeepSpeed can read.
    """
    found: list[Layer] = []
    skipped: list[str] = []
    seen: dict[frozenset[int], Layer] = {}
    for name, module in lora_modules(model):
        name = name.removeprefix(PREFIX)
        kind = _kind(module, adapter)
        if kind is None:
            if adapter in getattr(module, "r", {}):
                skipped.append(name)
            continue
        layer = Layer(name, module, kind)
        left, right = layer.parameters(adapter)
        for factor in (left, right):
            if hasattr(factor, "ds_id"):
                raise InputError(
                    f"{name}: its adapter is DeepSpeed's, in parts; initialise before its engine is made"
                )
            if factor.device.type == "meta":
                raise InputError(
                    f"{name}: its adapter has no memory yet (device `meta`); load the model first"
                )
        # Tied layers, one of which may have the other's transposed: one preheat, one result.
        memory = frozenset(local(factor).data_ptr() or id(factor) for factor in (left, right))
        if memory in seen:
            seen[memory].twins[name] = module
            continue
        seen[memory] = layer
        found.append(layer)
    return found, skipped


def lora_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import costs too much for all who have none


def _whole(stored: Tensor) -> Tensor:
    """A factor's values; every process calls this for a sharded one."""
    return stored.detach().full_tensor() if _is_sharded(stored) else stored.detach()  # type: ignore


def _kind(module: Any, adapter: str) -> Kind | None:
    if adapter in module.lora_embedding_A:
        return "embedding"
    if adapter not in module.lora_A:
        return None
    first, second = module.lora_A[adapter], module.lora_B[adapter]
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return "experts" if getattr(module, "num_experts", 1) > 1 else "linear"
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    if isinstance(first, convolutions) and isinstance(second, convolutions) and second.groups == 1:
        return "conv"  # with groups an output sees a part of the directions only
    return None
