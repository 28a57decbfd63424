"""What a state dict says of the run it is from, so that only a run like it goes on from there.

Directions depend on names, shapes and a few options; running means belong to the directions of their run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.tezo.options import ZerothOrderOptions

_DECISIVE = ("variant", "scale", "stacked", "factor_dtype", "refresh_interval", "interval")
"""Options that decide what the saved numbers stand for; others may change from run to run."""

Run = dict[str, Any]
"""Plain values alone, which `torch.load(weights_only=True)` reads."""


def run_of(named: Sequence[tuple[str, Tensor]], options: ZerothOrderOptions) -> Run:
    """What a state depends on: the method, the options that decide, and the parameters' names and shapes."""
    found = {key: getattr(options, key) for key in _DECISIVE if hasattr(options, key)}
    options_here = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    parameters = [[name, list(parameter.shape)] for name, parameter in named]
    return {"method": options.kind, "options": options_here, "parameters": parameters}


def check_run(state_dict: Mapping[str, Any], here: Run) -> None:
    """Refuse the state of a run unlike this one.

    Raises:
        InputError: names what differs, as it was saved and as it is here.
    """
    saved = state_dict.get("run")
    if saved is None:
        raise InputError("the saved state is not of this family: it has no entry `run`")
    if saved["method"] != here["method"]:
        raise InputError(f"the saved state is of `{saved['method']}`, this is `{here['method']}`")
    for key, value in here["options"].items():
        if saved["options"].get(key) != value:
            raise InputError(
                f"{key}: the saved state has {saved['options'].get(key)!r}, here it is {value!r}"
            )
    names = [[name for name, _ in run["parameters"]] for run in (saved, here)]
    for (old, shape_then), (name, shape_now) in zip(saved["parameters"], here["parameters"], strict=False):
        if old != name:
            raise InputError(
                f"{name}: the saved state has {old} in its place; give the optimiser the parameters and "
                "names that it had"
            )
        if shape_then != shape_now:
            raise InputError(f"{name}: the saved state has shape {shape_then}, here it is {shape_now}")
    if len(names[0]) != len(names[1]):
        raise InputError(f"the saved state has {len(names[0])} parameters, here there are {len(names[1])}")
