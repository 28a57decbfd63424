"""Probes that never touch a matrix: hooks add the perturbation to what its modules return.

The weights come back to the bit because they were never away, and nothing is written in a probe. It needs
modules that use the matrix as y = x W^T (`Linear`), W[ids] (`Embedding`) or y = x W (GPT-2's `Conv1D`)
through their own forward; parameters of others are copied and put back. So are matrices that the first probe
finds to be read by anything else (a head tied by hand, a fused attention), or by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        self._storages = {_storage(p): id(p) for p in parameters if id(p) in self._homes}
        self._products: dict[int, Product] = {}
        self._handles: dict[int, list[Any]] = {}
        self._ran: set[int] = set()
        self._missing: set[int] | None = None

    def holds(self, parameter: Tensor) -> bool:
        """Whether the parameter's modules can carry its perturbation."""
        return id(parameter) in self._homes

    def put(self, parameter: Tensor, product: Product | None) -> None:
        """The perturbation of a parameter from now on."""
        key = id(parameter)
        if product is None:
            self._products.pop(key, None)
            for handle in self._handles.pop(key, []):
                handle.remove()
            return
        self._products[key] = product
        if key not in self._handles:
            # First in line: other hooks see what they would see of moved weights.
            self._handles[key] = [
                module.register_forward_hook(self._hook(key), prepend=True, with_kwargs=True)
                for module in self._homes[key]
            ]

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Run a probe within: compiled modules as they are written, as compiled ones run no hooks; the first
        is watched.
        """
        with torch.compiler.set_stance("force_eager"):
            if self._missing is None:
                with self._watched():
                    yield
            else:
                yield

    def missing(self) -> set[int]:
        """Parameters, by id, whose perturbation did not reach the first probe everywhere."""
        return (self._missing or set()) & set(self._homes)

    def release(self, parameters: set[int]) -> None:
        """Hold these no longer."""
        for key in parameters:
            del self._homes[key]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        watch = _Watch(self._storages)
        self._ran.clear()
        handles = [
            hook
            for key, modules in self._homes.items()
            for module in modules
            for hook in (
                module.register_forward_pre_hook(lambda *_, key=key: watch.enter(key)),
                module.register_forward_hook(lambda *_: watch.enter(None), prepend=True),
            )
        ]
        try:
            with watch:
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._missing = watch.elsewhere | (set(self._homes) - self._ran)

    def _hook(self, key: int) -> Callable[..., Tensor]:
        def add(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            self._ran.add(key)
            left, right = self._products[key]
            rule = _rule(module)
            assert rule is not None
            (x,) = (*inputs, *named.values())
            return output + rule(x, left[0], right[0]).to(output.dtype)

        return add


class _Watch(TorchDispatchMode):
    """Notes matrices that an operation reads outside of their own modules.

    Args:
        storages: The matrix that lies in each.
    """

    supports_higher_order_operators = True

    def __init__(self, storages: Mapping[int, int]) -> None:
        super().__init__()
        self._storages = storages
        self._inside: int | None = None
        self.elsewhere: set[int] = set()

    def enter(self, key: int | None) -> None:
        """A module of this matrix runs now; or none does."""
        self._inside = key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what goes in, and go on."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                key = self._storages.get(_storage(value))
                if key is not None and key != self._inside:
                    self.elsewhere.add(key)
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory, which its views share; some subclasses have no address."""
    return tensor.untyped_storage()._cdata  # pyrefly: ignore[missing-attribute]


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
