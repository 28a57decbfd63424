"""Routed parameters inside a loaded model: which they are, and forward passes under a mix of experts.

Two modes. `materialize` merges dense part and experts once for each mix and keeps the last few; a batch that
shares one mix then runs at the speed of the plain model. `delta` runs the dense part on the whole batch and
adds each expert's sparse product to the rows that use it, so one batch may mix tasks; where rows of a mix
are many, it multiplies by a copy of the matrix with the experts added.

A module's `forward` is replaced on the instance and the parameters stay where they are, so the model remains
what transformers made of it. Modules that are no plain linear maps (norms, a mixture's experts) run once for
each mix in the batch, with merged parameters.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging.mediator.sparse import unpack
from weightsmith.merging.mediator.store import MediatorStore

Mode = Literal["materialize", "delta"]
Weights = tuple[float, ...]

# From so many rows a mix on, adding the experts to a copy of the matrix costs less than sparse products.
_MANY_ROWS = 32


@dataclass(frozen=True)
class Mix:
    """The experts of one batch.

    Attributes:
        rows: Weights of each sequence, in the order of the store's tasks.
        groups: Distinct weights -> the sequences that have them.
    """

    rows: tuple[Weights, ...]
    groups: dict[Weights, list[int]] = field(compare=False)
    _places: dict[tuple[int, torch.device], list[tuple[Weights, Tensor | None]]] = field(
        default_factory=dict, compare=False
    )

    @classmethod
    def of(cls, rows: Sequence[Weights]) -> Mix:
        """The mix of a batch."""
        groups: dict[Weights, list[int]] = {}
        for index, weights in enumerate(rows):
            groups.setdefault(weights, []).append(index)
        return cls(tuple(rows), groups)

    def repeated(self, batch: int) -> Mix:
        """The same for a batch in which each sequence stands several times (beams, several answers).

        Raises:
            InputError: the batch is no such repetition.
        """
        if batch == len(self.rows):
            return self
        if batch % len(self.rows):
            raise InputError(f"experts were chosen for {len(self.rows)} sequences, the batch has {batch}")
        times = batch // len(self.rows)
        return Mix.of([weights for weights in self.rows for _ in range(times)])

    def places(self, tokens: int, device: torch.device) -> list[tuple[Weights, Tensor | None]]:
        """Distinct weights, and the rows that have them where each sequence is so many rows; None for all."""
        if (tokens, device) not in self._places:
            # Made inside of an inference mode they could not be used outside of it.
            with torch.inference_mode(False):
                within = torch.arange(tokens, device=device)
                self._places[tokens, device] = [
                    (weights, (torch.tensor(sequences, device=device)[:, None] * tokens + within).reshape(-1))
                    for weights, sequences in self.groups.items()
                ]
            if self.single is not None:
                self._places[tokens, device] = [(self.single, None)]
        return self._places[tokens, device]

    @property
    def single(self) -> Weights | None:
        """The weights that all sequences share, if they do."""
        return next(iter(self.groups)) if len(self.groups) == 1 else None


@dataclass
class Target:
    """One parameter of the model and the stored tensors that its values come from.

    Attributes:
        module: Its owner.
        attribute: Its name there.
        dense: Its values without experts.
        pieces: Stored tensor -> where its elements lie in the flattened parameter; None for in order.
    """

    module: nn.Module
    attribute: str
    dense: Tensor
    pieces: dict[str, Tensor | None]

    @property
    def parameter(self) -> Tensor:
        """The parameter."""
        return getattr(self.module, self.attribute)


class Serving:
    """The routed parameters of a loaded model.

    Args:
        model: A Hugging Face causal language model that holds the store's averaged and dense parts.
        store: The experts.
        mode: See the module's text.
        cache_size: Mixes whose merged parameters are kept.
    """

    def __init__(self, model: Any, store: MediatorStore, mode: Mode, cache_size: int) -> None:
        if mode not in ("materialize", "delta"):
            raise InputError(f"mode: expected materialize or delta, got `{mode}`")
        if cache_size < 1:
            raise InputError(f"cache_size: expected at least 1 mix, got {cache_size}")
        self.model, self.store, self.mode, self.cache_size = model, store, mode, cache_size
        self.mix: Mix | None = None
        self.targets = find_targets(model, store, store.routed_tensors)
        self.parts = [_Part(self, module, targets) for module, targets in _owners(model, self.targets)]
        self._merged: OrderedDict[Weights, dict[int, Tensor]] = OrderedDict()
        self.switches = 0

    def use(self, mix: Mix | None) -> None:
        """Run what follows under a mix; None is the dense part alone."""
        if mix is self.mix:
            return
        single = mix.single if mix is not None else None
        swap = single is not None and any(single) and self.mode == "materialize"
        for target in self.targets:
            target.parameter.data = self.merged(target, single) if swap and single else target.dense
        for part in self.parts:
            part.plain = swap or mix is None or (single is not None and not any(single))
        self.mix = mix

    def merged(self, target: Target, weights: Weights) -> Tensor:
        """A parameter's values under a mix, kept for the next time."""
        if weights not in self._merged:
            while len(self._merged) >= self.cache_size:
                self._merged.popitem(last=False)
            self._merged[weights] = {}
            self.switches += 1
        self._merged.move_to_end(weights)
        cache = self._merged[weights]
        if id(target) not in cache:
            cache[id(target)] = self.compute(target, weights)
        return cache[id(target)]

    def compute(self, target: Target, weights: Weights) -> Tensor:
        """A parameter's values under a mix."""
        # Made inside of an inference mode they could not become a parameter's values outside of it.
        with torch.inference_mode(False), torch.no_grad():
            flat = target.dense.to(torch.float32, copy=True).reshape(-1)
            for tensor, places in target.pieces.items():
                for task, weight in zip(self.store.tasks, weights, strict=True):
                    if weight:
                        at, values = self.entries(tensor, task, flat.device)
                        at = at if places is None else places.to(at.device)[at]
                        flat.index_add_(0, at, values, alpha=weight)
            return flat.to(target.dense.dtype).reshape(target.dense.shape)

    def entries(self, tensor: str, task: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places and values of an expert's difference in a stored tensor."""
        form, parts = self.store.experts[task].delta(tensor)
        places, values = unpack(form, parts)
        return torch.from_numpy(places).to(device), torch.from_numpy(values).to(device)

    def forget(self) -> None:
        """Drop everything derived from the experts: they, or the model's device, changed."""
        self.use(None)
        self._merged.clear()
        for part in self.parts:
            part.products.clear()

    def moved(self) -> None:
        """The parameters are somewhere else now: take them as the dense part."""
        for target in self.targets:
            target.dense = target.parameter.data
        self.forget()

    def detach(self) -> None:
        """Give the model its own forward passes and dense parameters back."""
        self.use(None)
        for part in self.parts:
            del part.module.forward
        self.parts = []


class _Part:
    """The forward pass of one module that has routed parameters."""

    def __init__(self, serving: Serving, module: nn.Module, targets: list[Target]) -> None:
        self.serving, self.module, self.targets = serving, module, targets
        self.original = module.forward
        self.plain = True
        self.products: dict[str, Tensor] = {}
        self.linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        self.linear = self.linear and all(target.module is module for target in targets)
        module.forward = self  # pyrefly: ignore[bad-assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plain:
            return self.original(*args, **kwargs)
        mix = self.serving.mix
        assert mix is not None
        if self.serving.mode == "delta" and self.linear and len(args) == 1 and not kwargs:
            return self._with_experts(args[0], mix)
        if mix.single is not None:
            with self._parameters(mix.single):
                return self.original(*args, **kwargs)
        return self._by_groups(args, kwargs, mix)

    def _by_groups(self, args: Any, kwargs: Any, mix: Mix) -> Any:
        """Once for each mix in the batch, on the rows that have it."""
        joined: Any = None
        first = _first_tensor(args, kwargs)
        tokens = _tokens(first, mix, self.module)
        size = len(mix.rows) * tokens
        for weights, rows in mix.places(tokens, first.device):
            assert rows is not None
            own = [_rows_of(value, rows, size) for value in args]
            named = {key: _rows_of(value, rows, size) for key, value in kwargs.items()}
            with self._parameters(weights):
                found = self.original(*own, **named)
            joined = _place(joined, found, rows, size)
        return joined

    @contextmanager
    def _parameters(self, weights: Weights) -> Iterator[None]:
        for target in self.targets:
            target.parameter.data = self.serving.merged(target, weights) if any(weights) else target.dense
        try:
            yield
        finally:
            for target in self.targets:
                target.parameter.data = target.dense

    def _with_experts(self, x: Tensor, mix: Mix) -> Tensor:
        """A linear map's output where each sequence has its own experts.

        For few rows the dense product of all of them, and each expert's sparse product on the rows that use
        it; for many rows of each mix a product with the merged matrix.
        """
        if mix.single is None:
            _tokens(x, mix, self.module)
        flat = x.reshape(-1, x.shape[-1])
        places = mix.places(len(flat) // len(mix.rows), x.device)
        if len(flat) >= _MANY_ROWS * len(places):
            parts = [(self._merged_product(_taken(flat, rows), weights), rows) for weights, rows in places]
            y = parts[0][0]
            if mix.single is None:
                y = y.new_empty(len(flat), y.shape[1])
                for found, rows in parts:
                    y[rows] = found
        else:
            y = self.original(flat)
            for weights, rows in places:
                if any(weights):
                    change = self._change(_taken(flat, rows), weights).to(y.dtype)
                    y = y + change if rows is None else y.index_add(0, rows, change)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _change(self, x: Tensor, weights: Weights) -> Tensor:
        """What the experts add to the output of x (rows, in): fp32 (rows, out)."""
        change = torch.zeros(len(x), 1, device=x.device)
        for task, weight in self._active(weights):
            for target in self.targets:
                if target.attribute == "bias":
                    found = self._vector(target, task)[None]
                elif len(x) == 1:
                    found = torch.mv(self._product(target, task), x[0].float())[None]
                else:
                    found = torch.sparse.mm(self._product(target, task), x.float().T.contiguous()).T
                change = torch.add(change, found, alpha=weight)
        return change

    def _merged_product(self, x: Tensor, weights: Weights) -> Tensor:
        """The output of x (rows, in) with the experts added to the matrix, in fp32 and then rounded."""
        module: Any = self.module
        linear = isinstance(module, nn.Linear)  # Conv1D keeps (in, out)
        held = {"weight": module.weight, "bias": module.bias}
        for target in self.targets:
            is_bias = target.attribute == "bias"
            dense = target.parameter  # itself, for its gradient
            total = (dense if is_bias or linear else dense.T).float()
            for task, weight in self._active(weights):
                found = self._vector(target, task) if is_bias else self._product(target, task)
                total = torch.add(total, found, alpha=weight)
            held[target.attribute] = total.to(target.dense.dtype)
        routed = any(target.attribute == "weight" for target in self.targets)
        matrix = held["weight"] if linear or routed else held["weight"].T
        return nn.functional.linear(x, matrix, held["bias"])

    def _active(self, weights: Weights) -> list[tuple[str, float]]:
        return [pair for pair in zip(self.serving.store.tasks, weights, strict=True) if pair[1]]

    def _product(self, target: Target, task: str) -> Tensor:
        """An expert's difference as a sparse (out, in) matrix."""
        if task in self.products:
            return self.products[task]
        with torch.inference_mode(False):
            flat_at, values = self._whole(target, task)
            width = target.dense.shape[-1]
            at = torch.stack([flat_at // width, flat_at % width])
            shape = tuple(target.dense.shape)
            if not isinstance(self.module, nn.Linear):  # Conv1D keeps (in, out)
                at, shape = at.flip(0), shape[::-1]
            matrix = torch.sparse_coo_tensor(at, values, shape, check_invariants=False).coalesce()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that torch's CSR is in beta
                self.products[task] = matrix.to_sparse_csr()
        return self.products[task]

    def _vector(self, target: Target, task: str) -> Tensor:
        key = f"{task} bias"
        if key not in self.products:
            with torch.inference_mode(False):
                at, values = self._whole(target, task)
                vector = torch.zeros(target.dense.numel(), device=values.device)
                self.products[key] = vector.index_add_(0, at, values)
        return self.products[key]

    def _whole(self, target: Target, task: str) -> tuple[Tensor, Tensor]:
        """Places in the flattened parameter and values of an expert's difference."""
        found = []
        for tensor, places in target.pieces.items():
            at, values = self.serving.entries(tensor, task, target.dense.device)
            found.append((at if places is None else places.to(at.device)[at], values))
        return torch.cat([at for at, _ in found]), torch.cat([values for _, values in found])


def find_targets(
    model: Any, store: MediatorStore, tensors: Sequence[str], *, check: bool = True
) -> list[Target]:
    """The parameters of a loaded model that stored tensors went into.

    Loading may rename, split and fuse tensors. Where a name is no parameter's, the model's own way back to
    the files is asked where each element of a parameter would go.

    Args:
        model: A Hugging Face model.
        store: Where the tensors are.
        tensors: Their stored names.
        check: Compare the parameters with what is stored.

    Raises:
        CheckpointError: a tensor that no parameter comes from.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted, found = set(tensors), {}
    prefix = f"{model.base_model_prefix}."
    for tensor in tensors:
        for name in (tensor, prefix + tensor, tensor.removeprefix(prefix)):
            if name in parameters:
                found[name] = {tensor: None}
                wanted.discard(tensor)
                break
    if wanted:
        found |= _fused(model, parameters, wanted, found)
    if wanted:
        raise CheckpointError(
            f"{store.checkpoint.name}: tensor `{min(wanted)}` went into no parameter of "
            f"{type(model).__name__}"
        )
    targets = []
    for name, pieces in found.items():
        owner, _, attribute = name.rpartition(".")
        targets.append(Target(model.get_submodule(owner), attribute, parameters[name].data, pieces))
    for target in targets if check else ():
        _check_values(target, store)
    return targets


def _fused(
    model: Any, parameters: Mapping[str, Tensor], wanted: set[str], known: Mapping[str, Any]
) -> dict[str, dict[str, Tensor | None]]:
    """Parameters that are made of several stored tensors; takes those it finds out of `wanted`."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, dict[str, Tensor | None]] = {}
    for name, parameter in parameters.items():
        if name in known or not wanted:
            continue
        numbered = torch.arange(parameter.numel()).reshape(parameter.shape)
        for tensor, places in revert_weight_conversion(model, {name: numbered}).items():
            if tensor in wanted:
                found.setdefault(name, {})[tensor] = places.reshape(-1)
                wanted.discard(tensor)
    return found


def _check_values(target: Target, store: MediatorStore) -> None:
    """The parameter must hold what the files say: a loader that changes values would make experts
    nonsense.
    """
    flat = target.dense.detach().reshape(-1)
    for tensor, places in target.pieces.items():
        stored = torch.from_numpy(store.read(tensor)).to(flat.dtype)
        held = (flat if places is None else flat[places.to(flat.device)]).cpu()
        if held.shape != stored.shape or not torch.equal(held, stored):
            raise CheckpointError(
                f"{store.checkpoint.name}: parameter `{target.attribute}` of {type(target.module).__name__} "
                f"does not hold what `{tensor}` does; experts can't be added to it"
            )


def _owners(model: Any, targets: list[Target]) -> list[tuple[nn.Module, list[Target]]]:
    """The modules whose forward passes are replaced, with the routed parameters inside each.

    A list of modules inside a block is a mixture whose members see loose tokens: the module around it, which
    sees whole sequences, takes their place.
    """
    names = {id(module): name for name, module in model.named_modules()}
    lifted: dict[str, list[Target]] = {}
    for target in targets:
        name = names[id(target.module)]
        inside = re.match(r"((?:.*?\.)?\d+\..*?)\.[^.]+\.\d+(?:\.|$)", name)
        lifted.setdefault(inside[1] if inside else name, []).append(target)
    outer = [
        name for name in lifted if any(inner.startswith(f"{name}.") for inner in lifted if inner != name)
    ]
    for name in outer:
        for inner in [inner for inner in lifted if inner.startswith(f"{name}.")]:
            lifted[name] += lifted.pop(inner)
    return [(model.get_submodule(name), found) for name, found in lifted.items()]


def _tokens(first: Tensor, mix: Mix, module: nn.Module) -> int:
    """Rows of a module's input that belong to one sequence: the first axis is sequences, or all their
    tokens.
    """
    if len(first) % len(mix.rows):
        raise InputError(
            f"{type(module).__name__}: an input of {len(first)} rows can't be told apart into "
            f"{len(mix.rows)} sequences; use one mix for the whole batch"
        )
    return len(first) // len(mix.rows)


def _taken(flat: Tensor, rows: Tensor | None) -> Tensor:
    return flat if rows is None else flat[rows]


def _first_tensor(args: Any, kwargs: Any) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value
    raise InputError("a routed module was called without a tensor")


def _rows_of(value: Any, rows: Tensor, size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value[rows]
    if isinstance(value, tuple):
        return tuple(_rows_of(entry, rows, size) for entry in value)
    return value


def _place(joined: Any, found: Any, rows: Tensor, size: int) -> Any:
    """Outputs of some rows put where they belong in the output of all."""
    if isinstance(found, tuple):
        parts = joined or [None] * len(found)
        return tuple(_place(part, entry, rows, size) for part, entry in zip(parts, found, strict=True))
    if not isinstance(found, Tensor) or not found.ndim or len(found) != len(rows):
        return found
    if joined is None:
        joined = found.new_empty((size, *found.shape[1:]))
    joined[rows] = found
    return joined
