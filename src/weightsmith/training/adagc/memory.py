"""AdaGC's state as plain numbers: JSON holds it, and a float32 comes back bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.sharded import Slots

VERSION = 1


def pack(names: Sequence[str], slots: Sequence[Slots], gamma_S: Tensor, steps: int) -> dict[str, Any]:
    """The state by name: a number for each tensor, a list for each stacked one, None where none is known."""
    gamma = [None if value == float("inf") else value for value in gamma_S.tolist()]
    values = [gamma[s.start] if s.axis is None else gamma[s.start : s.start + s.count] for s in slots]
    return {"version": VERSION, "step": steps, "names": list(names), "gamma": values}


def check(state: Mapping[str, Any], names: Collection[str], strict: bool) -> None:
    """Refuse what is not a state, and under `strict` one of other tensors.

    Raises:
        InputError: says what is missing and what is too much.
    """
    if state.get("version") != VERSION:
        raise InputError(f"AdaGC state: version must be {VERSION}, got {state.get('version')!r}")
    missing, unexpected = set(names) - set(state["names"]), set(state["names"]) - set(names)
    if strict and (missing or unexpected):
        raise InputError(
            f"AdaGC state: missing tensors: {_listed(missing)}; unexpected tensors: {_listed(unexpected)}; "
            "strict=False starts the missing ones fresh"
        )


def unpack(state: Mapping[str, Any], names: Sequence[str], slots: Sequence[Slots]) -> Tensor:
    """Running means in the order of `slots`, (S,) float32 on the CPU.

    Raises:
        InputError: a tensor that is stacked now and was not then, or with another length.
    """
    saved = dict(zip(state["names"], state["gamma"], strict=True))
    gamma: list[float | None] = []
    for name, place in zip(names, slots, strict=True):
        value = saved.get(name)
        if value is None:
            gamma += [None] * place.count
            continue
        row = value if isinstance(value, list | tuple) else [value]
        if len(row) != place.count:
            raise InputError(f"AdaGC state: {name} has {len(row)} running means, expected {place.count}")
        gamma += row
    return torch.tensor([float("inf") if value is None else value for value in gamma], dtype=torch.float32)


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
