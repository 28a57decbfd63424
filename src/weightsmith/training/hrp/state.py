"""Directions of all layers as a dictionary of tensors: rows for A by the layer's name, columns for B by the
name and `:B`; those of experts are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.hrp.layers import Layer
from weightsmith.training.hrp.options import HRPOptions

LEFT = ":B"
"""What a name ends with where its tensor belongs to B; without it the tensor is A."""


def names_of(layer: Layer, options: HRPOptions) -> Iterator[str]:
    """Names of a layer's tensors."""
    if options.assign != "B":
        yield layer.name
    if options.assign != "A":
        yield layer.name + LEFT


def stacked(value: Tensor) -> Tensor:
    """One matrix for each expert; a layer without experts has one."""
    return value if value.ndim == 3 else value[None]


def ranks_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Ranks by layer."""
    return {
        name.removesuffix(LEFT): value.shape[-1 if name.endswith(LEFT) else -2]
        for name, value in state.items()
    }


def check_state(
    state: Mapping[str, Tensor], layers: Sequence[Layer], adapter: str, options: HRPOptions
) -> None:
    """That a dictionary has directions for exactly these layers of an adapter.

    Raises:
        InputError: names or shapes that aren't those of the layers, or values that are no numbers; with
            `rank_energy` a layer without experts may have another rank than the adapter's.
    """
    wanted = {name for layer in layers for name in names_of(layer, options)}
    missing, unexpected = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or unexpected:
        words = [f"{len(missing)} missing ({missing[0]})"] if missing else []
        words += [f"{len(unexpected)} unexpected ({unexpected[0]})"] if unexpected else []
        raise InputError(f"hrp_state_dict is of another model or adapter: {', '.join(words)}")
    for layer in layers:
        rows, columns = layer.sides
        rank = layer.module.r[adapter]
        experts = (layer.num_experts,) if layer.kind == "experts" else ()
        values = {name: state[name] for name in names_of(layer, options)}
        first = next(iter(values.values()))
        if options.rank_energy is not None and not experts and getattr(first, "ndim", 0) == 2:
            rank = max(1, ranks_of(values)[layer.name])
        for name, value in values.items():
            expected = (*experts, rows, rank) if name.endswith(LEFT) else (*experts, rank, columns)
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if found != expected:
                raise InputError(f"hrp_state_dict: {name} is {found}, the adapter needs {expected}")
            if not bool(value.isfinite().all()):
                raise InputError(f"hrp_state_dict: {name} has NaN or infinite values")
