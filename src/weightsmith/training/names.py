"""Parameters and their names, from whatever form an optimiser accepts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weightsmith.errors import InputError

Parameters = (
    nn.Module | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
)
"""A module, an optimiser or its groups, parameters, or `named_parameters()`."""

_WRAPPERS = re.compile(r"^module\.|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, `torch.compile` and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def named_parameters(params: Parameters, owner: str, start: int = 0) -> list[tuple[str, Tensor]]:
    """Name and parameter, in order; `param_<i>` from `start` where no name is known.

    Raises:
        InputError: none at all, the same one twice, or two of one name; the message starts with `owner`.
    """
    found: list[tuple[str | None, Tensor]] = []
    if isinstance(params, nn.Module):
        entries: Iterable[Any] = params.named_parameters()
    else:
        entries = params.param_groups if isinstance(params, Optimizer) else params
    for entry in [entries] if isinstance(entries, Tensor) else entries:
        if isinstance(entry, dict):
            members = [entry["params"]] if isinstance(entry["params"], Tensor) else list(entry["params"])
            names = entry.get("param_names") or [None] * len(members)
            found += [m if isinstance(m, tuple) else (n, m) for n, m in zip(names, members, strict=True)]
        else:
            found.append(entry if isinstance(entry, tuple) else (None, entry))
    if not found:
        raise InputError(f"{owner}: no parameters (a generator can be read only once)")
    named = [
        (f"param_{start + i}" if name is None else plain_name(name), parameter)
        for i, (name, parameter) in enumerate(found)
    ]
    for what, counts in (
        ("parameter", Counter(id(parameter) for _, parameter in named)),
        ("name", Counter(name for name, _ in named)),
    ):
        keys = {id(parameter) if what == "parameter" else name: name for name, parameter in named}
        twice = [keys[key] for key, count in counts.items() if count > 1]
        if twice:
            raise InputError(f"{owner}: the same {what} twice: {', '.join(twice[:5])}")
    return named
