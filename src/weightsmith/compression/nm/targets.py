"""Which parameters of a model are pruned, and along which axis their inputs lie.

    nn.Linear                      (outputs, inputs)   axis 1
    Conv1D of GPT-2's family       (inputs, outputs)   axis 0
    stacked experts, (E, ., .)     named by the caller with their axis, never guessed by shape

Dense in any case: embeddings, the output layer, norms, biases; and routers unless they are named themselves:
`layers.0` or `mlp` is not the name of the router inside. What reads images or sound beside a text decoder
stays dense unless `targets` names it. What names decide, `names.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from weightsmith.compression.nm.names import chosen, matches
from weightsmith.compression.nm.options import NMOptions
from weightsmith.errors import InputError, nearest

_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """One parameter to prune.

    Attributes:
        name: As `named_parameters` has it.
        parameter: The weight.
        dim: Axis of its inputs.
        modules: The layers it is the weight of; none for stacked experts.
        groups: How many groups it has.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    modules: tuple[nn.Module, ...]
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.parameter.shape)


def find_targets(model: nn.Module, options: NMOptions) -> list[Target]:
    """The parameters that `options` prune, in the model's order; a shared one once.

    Raises:
        InputError: nothing matches, and what there is; a pattern that fits nothing, or nothing that may be
            pruned; weights of a kind that can't be pruned: adapters, quantised or sharded ones; inputs that
            don't divide into groups.
    """
    _refuse_adapters(model)
    layers = dict(_linear_layers(model))
    kept_dense = _output_layer(model)
    _check_ignored(model, options)
    dense = {
        name
        for name, (module, _) in layers.items()
        if module.weight is kept_dense or matches(name, options.ignore)
    }
    for pattern in options.targets:
        fits = [name for name in layers if matches(name, [pattern])]
        if not fits:
            close = nearest(pattern, _last_parts(layers))
            raise InputError(f"targets: `{pattern}` fits no layer; linear layers are {some(layers)}{close}")
        if dense.issuperset(fits):
            raise InputError(
                f"targets: `{pattern}` fits only {some(fits)}, which stays dense: the output layer always "
                "does, and so does what `ignore` names"
            )
    found: dict[int, Target] = {}
    for name in chosen(
        [name for name, (layer, _) in layers.items() if layer.weight is not kept_dense], options
    ):
        module, dim = layers[name]
        weight: Any = module.weight
        if id(weight) in found:
            earlier = found[id(weight)]
            found[id(weight)] = Target(earlier.name, weight, dim, (*earlier.modules, module), earlier.groups)
        else:
            _add(found, f"{name}.weight".removeprefix("."), weight, dim, (module,), options)
    for pattern, dim in options.experts.items():
        named = [(name, p) for name, p in model.named_parameters() if matches(name, [pattern])]
        if not named:
            raise InputError(f"experts: `{pattern}` fits no parameter of the model")
        # A layer beside the stack, such as an expert that all tokens share, may have its name.
        stacks = [(name, parameter) for name, parameter in named if parameter.ndim == 3]
        if not stacks:
            name, parameter = named[0]
            raise InputError(
                f"experts: {name} has shape {list(parameter.shape)}, expected three axes, experts first"
            )
        kept = [(name, parameter) for name, parameter in stacks if not matches(name, options.ignore)]
        if not kept:
            raise InputError(f"experts: `{pattern}` fits only {some(dict(stacks))}, which `ignore` names")
        for name, parameter in kept:
            _add(found, name, parameter, dim % 3, (), options)
    if not found:
        raise InputError(f"nothing to prune: the model's linear layers are {some(layers)}")
    return list(found.values())


def dense_stacks(model: nn.Module, options: NMOptions) -> list[str]:
    """Stacks of matrices that stay dense because nothing names them, nor says that they should."""
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and min(parameter.shape) > 1
        and id(parameter) not in kernels
        and not matches(name, [*options.experts, *options.ignore])
    ]


def _check_ignored(model: nn.Module, options: NMOptions) -> None:
    """A misspelt pattern would prune what it was to spare."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for pattern in options.ignore:
        if pattern not in NMOptions.ignore and not any(matches(name, [pattern]) for name in names):
            raise InputError(
                f"ignore: `{pattern}` fits nothing in the model{nearest(pattern, _last_parts(names))}"
            )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _add(
    found: dict[int, Target],
    name: str,
    weight: nn.Parameter,
    dim: int,
    modules: tuple[nn.Module, ...],
    options: NMOptions,
) -> None:
    _check_weight(name, weight)
    if options.remainder == "dense" and weight.shape[dim] % options.nm.m:
        return
    groups = options.nm.groups(name, tuple(weight.shape), dim)
    found[id(weight)] = Target(name, weight, dim, modules, groups)


def _linear_layers(model: nn.Module) -> Iterable[tuple[str, tuple[nn.Module, int]]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, (module, 1)
        elif type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None:
            yield name, (module, 0)


def _output_layer(model: nn.Module) -> Tensor | None:
    """The weight of the output layer; tied to the embedding or not."""
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if ask is not None else None
    return getattr(layer, "weight", None)


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise InputError(
                f"{name or 'the model'} is PEFT's ({type(module).__name__}): its weight is a sum that no "
                "mask of the base makes sparse; call merge_and_unload() first"
            )


def _check_weight(name: str, weight: Tensor) -> None:
    kind = type(weight.data).__name__
    if hasattr(weight, "full_tensor"):
        raise InputError(f"{name}: is sharded over processes; prune the whole model in one")
    if not weight.is_floating_point() or weight.element_size() < 2 or kind not in ("Tensor", "Parameter"):
        raise InputError(f"{name}: is quantised ({kind} of {weight.dtype}); prune the model before that")
    if weight.device.type == "meta":
        raise InputError(f"{name}: has no memory yet (device `meta`); load the model first")


def some(layers: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(layers)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
