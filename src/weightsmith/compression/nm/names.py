"""Which parameters are pruned, as far as their names tell: what the work and its forecast have in common.

Nothing here imports torch, so a dry run can ask it about the headers of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from weightsmith.checkpoints.names import is_over_tokens, layer_index
from weightsmith.checkpoints.stacks import is_first, text_layers
from weightsmith.compression.nm.options import NMOptions

ROUTERS = ("router", "*_router", "gate", "shared_expert_gate")
"""Linear layers that choose experts, by the names that models give them."""
# A matrix of one expert as the hub has it, which is loaded as a part of a stack.
_OF_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.([^.]+)\.weight$")
_STACKED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
} | {"w2": "down_proj"}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits whole parts of a dotted name, anywhere in it.

    Example:
        >>> matches("model.layers.0.mlp.gate_proj", ["layers.0"])
        True
        >>> matches("model.layers.10.mlp.gate_proj", ["layers.1"])
        False
    """
    parts = name.split(".")
    runs = [
        ".".join(parts[first:last])
        for first in range(len(parts))
        for last in range(first + 1, len(parts) + 1)
    ]
    return any(fnmatchcase(run, pattern) for pattern in patterns for run in runs)


def chosen(layers: Collection[str], options: NMOptions) -> list[str]:
    """Of a model's linear layers those that `options` prune, in the same order; the output layer is none.

    Without `targets`, a model that also reads images or sound is pruned in its text decoder alone: text is
    all that calibration has.
    """
    return [
        name
        for name in (layers if options.targets else text_layers(layers))
        if not matches(name, options.ignore)
        and (not options.targets or matches(name, options.targets))
        and (not matches(name, ROUTERS) or is_named(name, options.targets))
    ]


def stored_matrices(shapes: Mapping[str, Sequence[int]], options: NMOptions) -> list[tuple[int, int]]:
    """Shapes of all matrices that `options` prune of a checkpoint, each of a stack by itself.

    Args:
        shapes: Of its tensors, by name.
        options: How it is pruned.
    """
    outside = [name for name in shapes if layer_index(name) is None]
    embeddings = {name for name in outside if is_over_tokens(name) or is_first(name)}
    tokens = max((shapes[name][0] for name in embeddings if len(shapes[name]) == 2), default=0)
    layers: dict[str, tuple[int, int]] = {}
    stacks: list[tuple[str, int, tuple[int, int]]] = []
    for name, shape in shapes.items():
        expert = _OF_EXPERT.match(name)
        if expert and len(shape) == 2:
            home = expert[1].replace("block_sparse_moe", "mlp")
            stacks.append((f"{home}.{_STACKED.get(expert[2], expert[2])}", 1, (shape[0], shape[1])))
        elif len(shape) == 3:
            stacks.append((name, shape[0], (shape[1], shape[2])))
        elif len(shape) == 2 and name.endswith(".weight") and name not in embeddings:
            layers[name.removesuffix(".weight")] = (shape[0], shape[1])
    # Whatever it is called, a matrix outside of the layers with a row for each token is the output layer.
    inner = [name for name, (rows, _) in layers.items() if rows != tokens or layer_index(name) is not None]
    found = [layers[name] for name in chosen(inner, options)]
    for name, count, matrix in stacks:
        if matches(name, options.experts) and not matches(name, options.ignore):
            found += [matrix] * count
    return [shape for shape in found if options.remainder == "error" or shape[1] % options.nm.m == 0]


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the router at the end of `name`, and not only what is around it."""
    parts = name.split(".")
    first = next(at for at, part in enumerate(parts) if matches(part, ROUTERS))
    for pattern in patterns:
        last = pattern.rpartition(".")[2]
        of_router = last.strip("*?") and any(fnmatchcase(part, last) for part in parts[first:])
        if of_router and matches(name, [pattern]):
            return True
    return False
