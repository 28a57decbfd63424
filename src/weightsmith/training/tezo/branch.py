"""Probes that never touch a matrix: hooks add the perturbation to what its modules return.

The weights come back to the bit because they were never away, and nothing is written in a probe. It needs
modules that use the matrix as y = x W^T (`Linear`), W[ids] (`Embedding`) or y = x W (GPT-2's `Conv1D`)
through their own forward; parameters of others are copied and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Product = tuple[Tensor, Tensor]
"""Left (1, M, R) and right (1, N, R) factor."""


class Branches:
    """Hooks for the matrices that can have them.

    Args:
        model: With their modules.
        parameters: Two-dimensional parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        wanted = {id(parameter) for parameter in parameters}
        homes: dict[int, list[nn.Module]] = {}
        unfit: set[int] = set()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) not in wanted:
                    continue
                if name == "weight" and _rule(module) is not None:
                    homes.setdefault(id(parameter), []).append(module)
                else:
                    unfit.add(id(parameter))
        self._homes = {key: modules for key, modules in homes.items() if key not in unfit}
        self._products: dict[int, Product] = {}
        self._handles: list[Any] = []

    def holds(self, parameter: Tensor) -> bool:
        """Whether the parameter's modules can carry its perturbation."""
        return id(parameter) in self._homes

    def put(self, parameter: Tensor, product: Product | None) -> None:
        """The perturbation of a parameter from now on."""
        if product is None:
            self._products.pop(id(parameter), None)
        else:
            self._products[id(parameter)] = product

    def switch(self, *, on: bool) -> None:
        """Set or remove the hooks."""
        if on and not self._handles:
            for key, modules in self._homes.items():
                self._handles += [module.register_forward_hook(self._hook(key)) for module in modules]
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _hook(self, key: int) -> Callable[..., Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            left, right = self._products[key]
            rule = _rule(module)
            assert rule is not None
            return output + rule(inputs[0], left[0], right[0]).to(output.dtype)

        return add


def _rule(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What a perturbation left @ right^T of the weight adds to the module's output; None if unknown."""
    # Subclasses may never run their forward (attention's output projection), so the class itself counts.
    if type(module) is nn.Linear:
        return lambda x, left, right: (x.to(right.dtype) @ right) @ left.mT
    if type(module) is nn.Embedding and module.max_norm is None:
        return lambda ids, left, right: left[ids] @ right.mT
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return lambda x, left, right: (x.to(left.dtype) @ left) @ right.mT
    return None
