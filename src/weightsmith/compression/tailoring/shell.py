"""A model without layers of its own: put some in, and it is a model.

What `torch.nn.Module` finds by walking through its children is found once, so that putting layers in costs
microseconds and not milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weightsmith.compression.tailoring.layers import text_config

_RECORDING = "transformers.utils.output_capturing"


class PlacedLayer:
    """A layer and what must be told when it gets another place or other tensors.

    Args:
        layer: The module.

    Attributes:
        layer: The module.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._modules: list[Any] = list(layer.modules())
        self._numbered = [
            module for module in self._modules if isinstance(getattr(module, "layer_idx", None), int)
        ]
        self._slots: dict[str, tuple[dict[str, Any], str]] = {}
        for name in layer.state_dict():
            parent, _, key = name.rpartition(".")
            owner: Any = layer.get_submodule(parent)
            held = owner._parameters if key in owner._parameters else owner._buffers
            self._slots[name] = (held, key)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors in the place of those of the same names, which a state dictionary has."""
        for name, tensor in tensors.items():
            held, key = self._slots[name]
            held[key] = tensor

    def renumber(self, number: int) -> None:
        """Tell the layer its place: the slot of its keys and values in a cache."""
        for module in self._numbered:
            module.layer_idx = number

    def begin(self) -> None:
        """Evaluation mode, as a layer of a model that has not run."""
        evaluate(self._modules)
        forget_recording(self._modules)

    def copy(self) -> PlacedLayer:
        """Modules of its own around the same tensors and the same config."""
        memo: dict[int, Any] = {
            id(tensor): tensor for tensor in (*self.layer.parameters(), *self.layer.buffers())
        }
        memo.update(
            (id(module.config), module.config) for module in self._modules if hasattr(module, "config")
        )
        return PlacedLayer(copy.deepcopy(self.layer, memo))


class Shell:
    """The modules of a model outside of its layers, around the same tensors.

    Args:
        model: The model; nothing in it is changed.
        path: Name of its list of layers.

    Attributes:
        model: A model of the same class, without layers until it is filled.
    """

    def __init__(self, model: Any, path: str) -> None:
        stack = model.get_submodule(path)
        memo: dict[int, Any] = {id(stack): nn.ModuleList(), **{id(layer): layer for layer in stack}}
        memo.update((id(value), value) for value in (*model.parameters(), *model.buffers()))
        self.model = copy.deepcopy(model, memo)
        parent, _, self._name = path.rpartition(".")
        self._body = self.model.get_submodule(parent)
        self._modules: list[Any] = list(self.model.modules())
        self._slots = {
            name: [
                (module._parameters, key)
                for module in self._modules
                for key, held in module._parameters.items()
                if held is value
            ]
            for name, value in self.model.named_parameters()
        }

    def fill(self, layers: Sequence[PlacedLayer], parameters: Mapping[str, nn.Parameter], config: Any) -> Any:
        """The model of these layers, in evaluation mode.

        Args:
            layers: In order.
            parameters: By name, in the place of those outside of the layers and of all that are tied to them.
            config: Of the modules outside of the layers.
        """
        for place, layer in enumerate(layers):
            layer.renumber(place)
            layer.begin()
        setattr(self._body, self._name, nn.ModuleList(layer.layer for layer in layers))
        for name, value in parameters.items():
            for held, key in self._slots[name]:
                held[key] = value
        for module in self._modules:
            replace_config(module, config)
        evaluate(self._modules)
        forget_recording(self._modules)
        return self.model


def evaluate(modules: Sequence[Any]) -> None:
    """Evaluation mode of modules whose children are among them."""
    for module in modules:
        if module.training:
            module.training = False


def forget_recording(modules: Sequence[Any]) -> None:
    """Take away the hooks by which transformers records hidden states and attentions. It puts them once on
    each model, on the layers that it has then; without them it does so again, on those that it has now.
    """
    for module in modules:
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", None) == _RECORDING]:
            del hooks[key]


def replace_config(module: Any, config: Any) -> None:
    """Give a module the new config in the place of the one of its kind."""
    held = module.__dict__.get("config")
    if held is None:
        return
    for new in (config, text_config(config)):
        if type(held) is type(new):
            module.config = new
            return
