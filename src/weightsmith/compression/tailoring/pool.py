"""All layers of all models, resident: a configuration is a list of references to them.

Problem  A search measures hundreds of models that differ in a few layers. Written and loaded one by one, most
         of the time goes into bytes that did not change.
Method   The base and K fine-tunes are loaded once. Dropping and choosing layers costs nothing but a new list
         of modules; only blends are computed, in fp32 with one cast, and kept in an LRU cache of a bounded
         size.
Rules    One source is taken as it is, bit for bit; no arithmetic touches it. Its tensors stand in modules
         of the base, so that what is measured computes by the config that is written. Tensors outside of the
         layers follow the first kept layer (embeddings) and the last one (norm, output), or are the base's,
         or the mean. A tied embedding is one tensor and follows the first. Integer tensors are the base's.
Source   arXiv:2506.20480; its public code takes the base of a blend from the place in the output, not from
         the layer it blends, which is another layer once one was dropped: `compat="repo"` does the same.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.checkpoints.stacks import is_first
from weightsmith.compression.tailoring.family import (
    check_fields,
    check_plain,
    check_tensors,
    warn_of_fields,
    warn_of_strangers,
)
from weightsmith.compression.tailoring.layers import fitted_config, stack_path
from weightsmith.compression.tailoring.options import Compat, Edge
from weightsmith.compression.tailoring.shell import PlacedLayer, Shell, replace_config
from weightsmith.compression.tailoring.space import Configuration, Layer
from weightsmith.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerPool:
    """The layers of a base and its fine-tunes, and models put together from them.

    Args:
        base: The base.
        candidates: K fine-tunes of it.
        names: What to call the base and the candidates in messages.
        edge: What tensors outside of the layers follow.
        compat: "repo" takes the base of a blend as the public code does.
        cache_bytes: Of blends that are kept.

    Attributes:
        base: The base.
        depth: l.
        names: As given.
        path: Name of the module list with the layers.
        num_blended: Layers that were blended so far, those found in the cache left out.

    Raises:
        InputError: the models don't fit one another, are quantised or sharded; names model and tensor or
        field.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        candidates: Sequence[PreTrainedModel] = (),
        *,
        names: Sequence[str] | None = None,
        edge: Edge = "follow",
        compat: Compat = "own",
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.base = base
        self.names = tuple(names or ("base", *(f"candidate {j}" for j in range(1, len(candidates) + 1))))
        self._models = (base, *candidates)
        self._edge, self._compat = edge, compat
        for name, model in zip(self.names, self._models, strict=True):
            check_plain(name, model)
            check_fields(name, model.config, self.names[0], base.config)
        self.path = stack_path(base)
        stacks: list[Any] = [model.get_submodule(self.path) for model in self._models]
        self._layers: list[list[nn.Module]] = [list(stack) for stack in stacks]
        self.depth = len(self._layers[0])
        self._edges = [dict(_outside(model, self.path)) for model in self._models]
        check_tensors(self.names, self.path, self._layers, self._edges)
        for name, model in zip(self.names[1:], candidates, strict=True):
            warn_of_fields(name, model.config, self.names[0], base.config)
        warn_of_strangers(self.names, self._layers)
        self._cache: _Cache = _Cache(cache_bytes)
        self._configs: dict[tuple[int, ...], Any] = {}
        self._parts: _Parts | None = None

    @property
    def num_candidates(self) -> int:
        """K."""
        return len(self._models) - 1

    @property
    def num_blended(self) -> int:
        """Layers and tensors that were blended, those found in the cache left out."""
        return self._cache.misses

    @property
    def nbytes(self) -> int:
        """Bytes of all models' parameters."""
        return sum(value.nbytes for model in self._models for value in model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def assemble(self, configuration: Configuration) -> Any:
        """The model of a configuration, in evaluation mode. It shares all tensors with the pool and is valid
        until the next one is assembled.

        Raises:
            InputError: a configuration of another depth, a source that is not there, or a blend whose base
                `compat="repo"` takes from a layer of other tensors.
        """
        self._check(configuration)
        if self._parts is None:
            self._parts = _Parts(self.base, self.path, self._layers)
        parts = self._parts
        if configuration != parts.assembled:
            parts.assembled = None
            layers = []
            for place, layer in enumerate(configuration.layers):
                if layer.is_merged:
                    layers.append(parts.blend(layer.layer, self._blend(layer, place, None)))
                else:
                    layers.append(parts.layer(_source(layer), layer.layer))
            parts.shell.fill(layers, self._outside(configuration, None), self._config(configuration.kept))
            parts.assembled = configuration
        return parts.shell.model

    def build(self, configuration: Configuration, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The same as a model of its own that shares nothing.

        Args:
            configuration: What to put together.
            dtype: Of its floating-point tensors: blends are cast to it once. The pool's by default.

        Raises:
            InputError: as `assemble`.
        """
        self._check(configuration)
        layers = []
        for place, layer in enumerate(configuration.layers):
            made = PlacedLayer(self._layers[0][layer.layer]).copy()
            if layer.is_merged:
                made.put(self._blend(layer, place, dtype))
            elif layer.sources:
                made.put(self._layers[layer.sources[0]][layer.layer].state_dict(keep_vars=True))
            layers.append(PlacedLayer(copy.deepcopy(made.layer).to(dtype or _dtype(made.layer))))
        outside = {}
        for name, value in self._outside(configuration, dtype).items():
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            outside[name] = nn.Parameter(value.detach().to(wanted, copy=True), value.requires_grad)
        config = copy.deepcopy(self._config(configuration.kept))
        if dtype is not None:
            config.dtype = dtype
        shell = Shell(self.base, self.path)
        for module in shell.model.modules():
            module._buffers.update(
                {key: value.clone() for key, value in module._buffers.items() if value is not None}
            )
        model = shell.fill(layers, outside, config)
        for module in model.modules():
            replace_config(module, config)
        if (generation := getattr(self.base, "generation_config", None)) is not None:
            model.generation_config = copy.deepcopy(generation)
        return model

    def origins(self, configuration: Configuration) -> dict[str, str]:
        """Where each parameter outside of the layers comes from, by name; equal texts for equal values."""
        found = {}
        for name in self._edges[0]:
            sources, weight = self._edge_sources(configuration, name)
            found[name] = "+".join(map(str, sources)) + f"*{weight!r}" * (len(sources) > 1)
        return found

    def num_parameters(self, configuration: Configuration) -> int:
        """Parameters of the model of a configuration, tied ones once."""
        inside = sum(
            p.numel() for layer in configuration.layers for p in self._layers[0][layer.layer].parameters()
        )
        return inside + sum(value.numel() for value in self._edges[0].values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_cache": _Cache(self._cache.max_bytes)}

    def _check(self, configuration: Configuration) -> None:
        if configuration.depth != self.depth:
            raise InputError(
                f"a configuration of {configuration.depth} layers, {self.names[0]} has {self.depth}"
            )
        for layer in configuration.layers:
            if layer.sources and layer.sources[-1] > self.num_candidates:
                raise InputError(
                    f"layer {layer.layer}: source {layer.sources[-1]}, there are {self.num_candidates} "
                    "candidates"
                )

    def _check_shifted(self, number: int, shifted: int) -> None:
        """Refuse a base layer that has not the tensors of the layer that is to be blended with it."""
        wanted, found = (self._layers[0][place].state_dict() for place in (number, shifted))
        for name in sorted({*wanted, *found}):
            shapes = [list(one[name].shape) if name in one else "missing" for one in (wanted, found)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"layer {number}: compat repo takes the base of its blend from layer {shifted}, where "
                    f"`{name}` is {shapes[1]}, expected {shapes[0]}; layers of several kinds need compat own"
                )

    def _config(self, kept: tuple[int, ...]) -> Any:
        if kept not in self._configs:
            if len(self._configs) > 256:
                self._configs.clear()
            self._configs[kept] = fitted_config(self.base.config, kept)
        return self._configs[kept]

    def _blend(self, layer: Layer, place: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of a blended layer, by name."""
        number = place if self._compat == "repo" else layer.layer
        if number != layer.layer:
            self._check_shifted(layer.layer, number)
        sources = [self._layers[source][layer.layer] for source in layer.sources]
        make = partial(_blended_layer, sources, self._layers[0][number], layer.weight, dtype)
        return self._cache.get((layer, number, dtype), make)

    def _outside(self, configuration: Configuration, dtype: torch.dtype | None) -> dict[str, nn.Parameter]:
        """Parameters outside of the layers, by name."""
        found: dict[str, Any] = {}
        for name in self._edges[0]:
            sources, weight = self._edge_sources(configuration, name)
            base = self._edges[0][name]
            if len(sources) < 2:
                found[name] = self._edges[sources[0] if sources else 0][name]
            else:
                values = [self._edges[source][name] for source in sources]
                make = partial(_blended_parameter, name, base, values, weight, dtype)
                found.update(self._cache.get((name, sources, weight, dtype), make))
        return found

    def _edge_sources(self, configuration: Configuration, name: str) -> tuple[tuple[int, ...], float]:
        """The sources of a parameter outside of the layers, and their weight."""
        if self._edge == "base" or not self.num_candidates:
            return (), 1.0
        if self._edge == "mean":
            return tuple(range(1, self.num_candidates + 1)), 1.0 / self.num_candidates
        layer = configuration.layers[0 if is_first(name) else -1]
        return layer.sources, layer.weight


class _Parts:
    """What models are assembled of, found once: the modules of one of them are those of the next.

    Attributes:
        shell: Holds the layers of the model that was assembled.
        assembled: What that is made of.
    """

    def __init__(self, base: Any, path: str, layers: Sequence[Sequence[nn.Module]]) -> None:
        self.shell = Shell(base, path)
        self.assembled: Configuration | None = None
        self._layers = layers
        self._known: dict[tuple[int, int], PlacedLayer] = {}
        self._blends: dict[int, PlacedLayer] = {}

    def layer(self, source: int, number: int) -> PlacedLayer:
        """A layer of the base or of a candidate."""
        if (source, number) not in self._known:
            # Modules of its own: those of a loaded model are its owner's, numbers, mode, hooks and all.
            placed = PlacedLayer(self._layers[0][number]).copy()
            if source:
                placed.put(self._layers[source][number].state_dict(keep_vars=True))
            self._known[source, number] = placed
        return self._known[source, number]

    def blend(self, number: int, tensors: Mapping[str, Tensor]) -> PlacedLayer:
        """A layer with these tensors."""
        if number not in self._blends:
            self._blends[number] = self.layer(0, number).copy()
        self._blends[number].put(tensors)
        return self._blends[number]


class _Cache:
    """Tensors by key, the least recently used ones given up beyond a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._held = max_bytes, 0
        self._entries: OrderedDict[Hashable, tuple[dict[str, Tensor], int]] = OrderedDict()
        self.misses = 0

    def get(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        self.misses += 1
        made = make()
        size = sum(value.nbytes for value in made.values())
        if size <= self.max_bytes:
            self._entries[key] = (made, size)
            self._held += size
            while self._held > self.max_bytes:
                self._held -= self._entries.popitem(last=False)[1][1]
        return made


def blended(
    base: Tensor, values: Sequence[Tensor], weight: float, dtype: torch.dtype | None = None
) -> Tensor:
    """`base + weight * sum(values - base)`, in fp32 with one cast at the end; the base of integer tensors."""
    if not base.is_floating_point():
        return base.clone()
    with torch.no_grad():
        start = base.detach().float()
        change = torch.zeros_like(start)
        for value in values:
            change += value.detach().float() - start
        return (start + weight * change).to(dtype or base.dtype)


def _blended_parameter(
    name: str, base: Tensor, values: Sequence[Tensor], weight: float, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {name: nn.Parameter(blended(base, values, weight, dtype), requires_grad=False)}


def _blended_layer(
    sources: Sequence[nn.Module], base: nn.Module, weight: float, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Of all parameters and buffers, by name."""
    values = [source.state_dict() for source in sources]
    made: dict[str, Tensor] = {}
    for name, old in base.state_dict(keep_vars=True).items():
        new = blended(old, [value[name] for value in values], weight, dtype)
        made[name] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    return made


def _source(layer: Layer) -> int:
    """The model that a layer is taken from as it is."""
    return layer.sources[0] if layer.sources else 0


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), None)


def _outside(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters outside of the layers; a tied one under the name that comes first, which is the
    embedding's.
    """
    for name, value in model.named_parameters():
        if not name.startswith(f"{path}."):
            yield name, value
