"""Activations after the first layers, kept from one configuration to the next.

Calibration inputs are the same for every configuration, so what comes out of layer j depends on the layers up
to j and on what else was run before: embeddings, their norms. What that is, passes themselves tell by the
modules that they call. It is kept at a few depths; a configuration that begins like an earlier one starts at
the deepest of them. Kept as computed, so nothing changes by a bit.

Inputs are recognised by their content. Passes that fill a cache of keys and values or record what layers
give, and training, go the whole way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.compression.tailoring.space import Configuration

if TYPE_CHECKING:
    from weightsmith.compression.tailoring.pool import LayerPool

Key = tuple[str, bytes]

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What is asked of every layer, also of one whose output is known."""


class PrefixCache:
    """Activations by prefix and input, the least recently used ones given up.

    Args:
        max_bytes: Of activations; 0 keeps none.
        cuts: Depths at which they are kept, evenly spaced.

    Attributes:
        num_skipped: Layers that were not run.
        num_run: Layers that were run.
    """

    def __init__(self, max_bytes: int, cuts: int = 7) -> None:
        self._max, self._held, self._cuts = max_bytes, 0, cuts
        self._entries: OrderedDict[Key, tuple[Tensor, bool]] = OrderedDict()
        self._before: dict[int, set[str]] = {}
        self._holders: tuple[Any, list[tuple[Any, frozenset[str]]]] | None = None
        self.num_skipped = self.num_run = 0

    @contextmanager
    def reading(self, model: Any, pool: LayerPool, configuration: Configuration) -> Iterator[None]:
        """Inside the block passes of `model` start as deep as they can.

        Args:
            model: A model that `pool` assembled for `configuration`.
            pool: Its layers, one and the same for all passes.
            configuration: What it is made of.
        """
        if not self._max:
            yield
            return
        parent, _, last = pool.path.rpartition(".")
        body: Any = model.get_submodule(parent)
        run = _Run(self, body, last, configuration, pool.origins(configuration))
        hooks = [
            model.register_forward_pre_hook(run.forget),
            *(
                module.register_forward_pre_hook(lambda *_, names=names: run.use(names))
                for module, names in self._holders_of(model, pool.path)
            ),
            body.register_forward_pre_hook(run.begin, with_kwargs=True),
            body.register_forward_hook(run.end, always_call=True),
        ]
        try:
            yield
        finally:
            run.end()
            for hook in hooks:
                hook.remove()

    def places(self, num_layers: int) -> list[int]:
        """Layers after which activations are kept, the deepest first."""
        found = {(cut + 1) * num_layers // (self._cuts + 1) - 1 for cut in range(self._cuts)}
        return sorted((place for place in found if place >= 0), reverse=True)

    def _holders_of(self, model: Any, path: str) -> list[tuple[Any, frozenset[str]]]:
        """Modules outside of the layers with parameters of their own, and the names of these. The modules of
        what a pool assembles stay the same.
        """
        if self._holders is None or self._holders[0] is not model:
            outside = [(at, module) for at, module in model.named_modules() if not at.startswith(f"{path}.")]
            names = {id(value): name for name, value in model.named_parameters()}
            found = [
                (
                    module,
                    frozenset(names[id(value)] for value in module._parameters.values() if value is not None),
                )
                for _, module in outside
            ]
            self._holders = model, [(module, own) for module, own in found if own]
        return self._holders[1]

    def before(self, place: int) -> set[str]:
        """Parameters outside of the layers that passes used up to layer `place`, to be added to."""
        return self._before.setdefault(place, set())

    def get(self, key: Key) -> tuple[Tensor, bool] | None:
        """Activations, and whether they came in a tuple."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Key, hidden: Tensor, in_tuple: bool) -> None:
        """Keep activations."""
        if key in self._entries or hidden.nbytes > self._max:
            return
        self._entries[key] = (hidden, in_tuple)
        self._held += hidden.nbytes
        while self._held > self._max:
            self._held -= self._entries.popitem(last=False)[1][0].nbytes


class _Run:
    """Passes of one assembled model."""

    def __init__(
        self,
        cache: PrefixCache,
        body: Any,
        name: str,
        configuration: Configuration,
        origins: Mapping[str, str],
    ) -> None:
        self._cache, self._body, self._name = cache, body, name
        self._layers: nn.ModuleList = getattr(body, name)
        keys = configuration.key.split(";")
        self._prefixes = [";".join(keys[: place + 1]) for place in range(len(keys))]
        self._origins = origins
        self._used: set[str] = set()
        self._hooks: list[Any] = []

    def forget(self, *_: Any) -> None:
        """Before a pass of the whole model: nothing was used yet."""
        self._used.clear()

    def use(self, names: frozenset[str]) -> None:
        """A module is called that holds these parameters."""
        self._used |= names

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: put what is known in the place of the first layers, listen where something is
        not.
        """
        if (
            module.training
            or any(kwargs.get(name) or getattr(module.config, name, False) for name in _RECORDED)
            or kwargs.get("past_key_values") is not None
            or kwargs.get("use_cache") is not False
        ):
            return
        inputs = _digest(args, kwargs)
        places = self._cache.places(len(self._layers))
        start = -1
        for place in places:
            if (found := self._cache.get(self._key(place, inputs))) is not None:
                start = place
                self._used |= self._cache.before(place)
                standins = [_Standin(layer, None, found[1]) for layer in self._layers[:place]]
                standins.append(_Standin(self._layers[place], *found))
                setattr(self._body, self._name, nn.ModuleList([*standins, *self._layers[place + 1 :]]))
                break
        self._cache.num_skipped += start + 1
        self._cache.num_run += len(self._layers) - start - 1
        for place in places:
            if place > start:
                listen = self._listener(place, inputs)
                self._hooks.append(self._layers[place].register_forward_hook(listen))

    def end(self, *_: Any) -> None:
        """After a pass: the model is what it was."""
        setattr(self._body, self._name, self._layers)
        while self._hooks:
            self._hooks.pop().remove()

    def _key(self, place: int, inputs: bytes) -> Key:
        origins = (f"{name}={self._origins[name]}" for name in sorted(self._cache.before(place)))
        return ";".join((self._prefixes[place], *origins)), inputs

    def _listener(self, place: int, inputs: bytes) -> Any:
        def listen(_: nn.Module, __: Any, output: Any) -> None:
            in_tuple = isinstance(output, tuple)
            self._cache.before(place).update(self._used)
            key = self._key(place, inputs)
            self._cache.put(key, (output[0] if in_tuple else output).detach(), in_tuple)

        return listen


class _Standin(nn.Module):
    """In the place of a layer whose output is known, or doesn't matter."""

    def __init__(self, layer: nn.Module, known: Tensor | None, in_tuple: bool) -> None:
        super().__init__()
        # Not as a child: what the model reads of a layer, such as its kind of attention, is asked of it.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_known", known)
        self._in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        known = object.__getattribute__(self, "_known")
        hidden = hidden_states if known is None else known
        return (hidden,) if self._in_tuple else hidden


def _digest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """The content of everything that goes into a pass."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        digest.update(f"{name}=".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()
