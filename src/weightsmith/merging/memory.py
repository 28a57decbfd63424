"""Merging what is in memory: NumPy arrays and torch tensors, by the same methods as checkpoints.

A tensor of torch comes back as one, in the base's (or first model's) dtype and on its device; torch itself is
never imported by element-wise methods. Arithmetic is fp32 whatever the dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from weightsmith.checkpoints import layer_index
from weightsmith.errors import InputError
from weightsmith.merging.matrices import crowded
from weightsmith.merging.options import build
from weightsmith.merging.parameter import TILE_ELEMENTS, Parameter, Statistic
from weightsmith.registry import load

log = logging.getLogger(__name__)


def merge_tensors(
    base: Any | None,
    models: Sequence[Any],
    method: str,
    *,
    device: str = "cpu",
    statistics: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Merge one parameter of several models.

    Args:
        base: Array or tensor of the base, or None for methods without one.
        models: The same parameter of each model.
        method: A merge method's id.
        device: Where a spectral method computes.
        statistics: For a method that needs them, what was measured of this parameter in each model.
        **options: The method's options; `lambda_` for `lambda`.

    Returns:
        An array, or a tensor where the inputs are tensors.

    Raises:
        InputError: shapes differ, the base is missing, an option is wrong.
        CheckpointError: NaN or infinity among the values.

    Example:
        >>> base, one, two = np.zeros(3), np.array([1.0, 2.0, 0.0]), np.array([3.0, -6.0, 0.0])
        >>> merge_tensors(base, [one, two], "linear")
        array([ 2., -2.,  0.])
        >>> merge_tensors(base, [one, two], "task_arithmetic", lambda_=0.5)
        array([ 2., -2.,  0.])
    """
    name = "tensor"
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: model} for model in models],
        method,
        device=device,
        statistics=None if statistics is None else [{name: measured} for measured in statistics],
        **options,
    )
    return merged[name]


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    models: Sequence[Mapping[str, Any]],
    method: str,
    *,
    device: str = "cpu",
    config: Mapping[str, Any] | None = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge whole state dicts; arguments as in `merge_tensors`.

    Args:
        base: Name -> array or tensor, or None.
        models: The same for each model, with the same names.
        method: A merge method's id.
        device: Where a spectral method computes.
        config: The models' config, where a spectral method is to take fused layers apart.
        statistics: For a method that needs them, name -> what was measured of it, for each model: Fisher
            information of every parameter, or Gram matrices of some linear layers.
        **options: The method's options.

    Returns:
        Name -> merged array or tensor. Integer entries must be equal and are copied.
    """
    cls = load(method, "merging")
    if cls.base == "required" and base is None:
        raise InputError(f"`{method}` changes a base: give the model the others were tuned from")
    sources = list(models)
    if getattr(cls, "base_is_model", False) and base is not None:
        sources = [base, *sources]
    uses_base = cls.base != "none" and base is not None
    if len(sources) < cls.min_models or (cls.max_models is not None and len(sources) > cls.max_models):
        wanted = f"{cls.min_models}" + (" or more" if cls.max_models != cls.min_models else "")
        raise InputError(f"`{method}` merges {wanted} models, got {len(sources)}")
    instance = build(cls, options, len(sources))
    measured = _measured(method, getattr(cls, "statistics", None), sources, statistics)
    reference = base if uses_base and base is not None else sources[0]
    _check(reference, [*([base] if uses_base else []), *sources])
    merged: dict[str, Any] = {}
    parameters, finish = [], {}
    for name, like in reference.items():
        if not _is_float(like):
            merged[name] = like
            continue
        arrays = [_array(source[name]) for source in sources]
        parameters.append(
            Parameter(
                name,
                arrays[0].shape,
                models=[f"model {index}" for index in range(len(sources))],
                readers=[_reader(array) for array in arrays],
                base_reader=_reader(_array(base[name])) if uses_base and base is not None else None,
                statistics=measured(name),
                layer=layer_index(name),
                config=config,
                tile_elements=TILE_ELEMENTS,
            )
        )
        finish[name] = like
    parameters.sort(key=lambda parameter: parameter.name)  # statistics over tensors count in this order
    for warning in crowded((parameter, instance) for parameter in parameters):
        log.warning("%s: %s", method, warning)
    stats = _survey(instance, parameters)
    for parameter in parameters:
        values = _merge_one(instance, parameter, stats, device)
        merged[parameter.name] = _like(values.reshape(parameter.shape), finish[parameter.name])
    return {name: merged[name] for name in reference}


def _measured(
    method: str,
    kind: str | None,
    sources: Sequence[Mapping[str, Any]],
    statistics: Sequence[Mapping[str, Any]] | None,
) -> Callable[[str], list[Statistic]]:
    """What was measured of a parameter in each model, by its name; nothing for methods that ask for none."""
    if (kind is None) != (statistics is None):
        wanted = f"needs statistics ({kind}) of each model" if kind else "takes no statistics"
        raise InputError(f"`{method}` {wanted}")
    given = list(statistics or ())
    if kind is not None and len(given) != len(sources):
        raise InputError(f"statistics: {len(given)} are given for {len(sources)} models")

    def of(name: str) -> list[Statistic]:
        holders = [name in each for each in given]
        if kind is None or (kind == "gram" and not any(holders)):
            return []
        if not all(holders):
            raise InputError(f"statistics: those of model {holders.index(False)} have no `{name}`")
        arrays = [_array(each[name]) for each in given]
        shape = tuple(sources[0][name].shape) if given else ()
        for place, array in enumerate(arrays):
            fits = array.shape == shape if kind == "fisher" else array.shape in {(n, n) for n in shape}
            if not fits:
                raise InputError(
                    f"statistics: {kind} of {name} in model {place} is {list(array.shape)}, the parameter is "
                    f"{list(shape)}"
                )
        return [Statistic(array.shape, _reader(array)) for array in arrays]

    return of


def _survey(method: Any, parameters: Sequence[Parameter]) -> Mapping[str, Any]:
    if getattr(method, "global_survey", False):
        return method.survey_all(parameters, lambda work, some: [work(parameter) for parameter in some])
    return {}


def _merge_one(method: Any, parameter: Parameter, stats: Mapping[str, Any], device: str) -> np.ndarray:
    known = stats[parameter.name] if parameter.name in stats else method.survey(parameter)
    if getattr(method, "spectral", False) and method.takes(parameter):
        return method.merge_whole(*parameter.whole(), parameter, device=device, stats=known)[0]
    values = np.empty(parameter.numel, np.float32)
    for tile in parameter.tiles():
        values[tile.start : tile.start + tile.numel] = method.merge_tile(tile, known)
    return values


def _check(reference: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> None:
    for place, source in enumerate(sources):
        different = set(reference) ^ set(source)
        if different:
            raise InputError(f"input {place}: `{min(different)}` is not in all state dicts")
        for name, like in reference.items():
            found = source[name]
            if tuple(found.shape) != tuple(like.shape):
                raise InputError(
                    f"input {place}: {name} is {list(found.shape)}, the first has {list(like.shape)}"
                )
            if not _is_float(like) and not bool((found == like).all()):
                raise InputError(f"input {place}: {name} holds integers that differ from the first's")


def _is_float(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind == "f"
    return values.is_floating_point()


def _array(values: Any) -> np.ndarray:
    """fp32 array of the same shape; a tensor is brought to the CPU."""
    if not isinstance(values, np.ndarray):
        values = values.detach().cpu().float().numpy()
    return np.ascontiguousarray(values, np.float32)


def _reader(array: np.ndarray) -> Callable[[int, int, np.ndarray], None]:
    flat = array.reshape(-1)

    def read(start: int, stop: int, out: np.ndarray) -> None:
        np.copyto(out, flat[start:stop])

    return read


def _like(values: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return values.astype(like.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)
