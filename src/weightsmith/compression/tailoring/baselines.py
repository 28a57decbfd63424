"""Layers taken out of one model by a rule: what a search has to beat.

    ShortGPT     block influence BI_i = 1 - E cos(h_i, h_{i+1}); the R smallest go         arXiv:2403.03853
    angular      the block of R layers of the least arccos(cos(h_i, h_{i+R})) / pi goes    arXiv:2403.17887
    LaCo         from the top down, the next m layers' differences are added to a layer,
                 theta_i + sum_k (theta_{i+k} - theta_i), while the outputs stay alike;
                 theta is of the model as it is by then: a sum may be added to another     arXiv:2402.11187
    greedy       the layer without which perplexity is least goes, one after the other     arXiv:2402.09025

`random` with as many trials as a search is the option `optimizer="random"` of `TailorSearch`.

Inputs are batches of token ids of equal length: nothing is padded. Means are over all tokens; the angular
rule reads the last token of each row, as its authors do. LaCo stops when R layers are gone; where its
threshold leaves too many it is lowered in steps, which the paper does by hand.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.compression.tailoring.layers import fitted_config, stack_path
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.shell import PlacedLayer, replace_config
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Sequence[Tensor]
_LEAST_THRESHOLD = -1.0


def block_influence(model: PreTrainedModel, batches: Batches) -> list[float]:
    """BI of each layer: how far it turns the residual stream, on average over tokens."""
    sums: list[float] = []
    count = 0

    def look(hidden: list[Tensor]) -> None:
        nonlocal count
        turns = [1.0 - _cosine(one, next_).double() for one, next_ in itertools.pairwise(hidden)]
        sums[:] = [
            total + float(turn.sum()) for total, turn in zip(sums or [0.0] * len(turns), turns, strict=True)
        ]
        count += turns[0].numel()

    _each_batch(model, batches, look)
    return [total / count for total in sums]


def shortgpt(model: PreTrainedModel, batches: Batches, num_dropped: int) -> Configuration:
    """The model without the layers of least block influence.

    Raises:
        InputError: no such number of layers can be dropped, or there is no batch.
    """
    _check_number(model, num_dropped)
    influence = block_influence(model, batches)
    order = sorted(range(len(influence)), key=lambda layer: (influence[layer], layer))
    return Configuration.of(len(influence), order[:num_dropped])


def angular_block(model: PreTrainedModel, batches: Batches, num_dropped: int) -> Configuration:
    """The model without the contiguous block that turns the residual stream least.

    Raises:
        InputError: no such number of layers can be dropped, or there is no batch.
    """
    depth = _check_number(model, num_dropped)
    totals: list[float] = []

    def look(hidden: list[Tensor]) -> None:
        if not totals:
            totals.extend([0.0] * (len(hidden) - num_dropped))
        for begin in range(len(totals)):
            cosine = _cosine(hidden[begin][:, -1], hidden[begin + num_dropped][:, -1]).clamp(-1.0, 1.0)
            totals[begin] += float((torch.arccos(cosine.double()) / math.pi).sum())

    _each_batch(model, batches, look)
    begin = min(range(len(totals)), key=lambda place: (totals[place], place))
    return Configuration.of(depth, range(begin, begin + num_dropped))


def greedy(model: PreTrainedModel, batches: Batches, num_dropped: int) -> Configuration:
    """The model without layers that were taken out one by one, each time the one whose loss costs least
    perplexity.

    Costs (l + (l - 1) + ...) passes over the batches, R terms.

    Raises:
        InputError: no such number of layers can be dropped, or there is no batch.
    """
    _check_number(model, num_dropped)
    pool = LayerPool(model)
    gone: list[int] = []
    for _ in range(num_dropped):
        nats = {
            layer: _nats(pool.assemble(Configuration.of(pool.depth, [*gone, layer])), batches)
            for layer in range(pool.depth)
            if layer not in gone
        }
        gone.append(min(nats, key=lambda layer: (nats[layer], layer)))
    return Configuration.of(pool.depth, gone)


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """What LaCo did.

    Attributes:
        model: The smaller model; it shares nothing with the one it was made from.
        groups: Numbers of the base's layers that stand in each place of it: one, or a layer and those folded
            into it, at once or one fold inside of another.
        threshold: The one at which enough layers were gone.
    """

    model: PreTrainedModel
    groups: tuple[tuple[int, ...], ...]
    threshold: float


def laco(
    model: PreTrainedModel,
    batches: Batches,
    num_dropped: int,
    *,
    num_merged: int = 3,
    lowest: int = 1,
    interval: int = 2,
    threshold: float = 0.65,
    step: float = 0.05,
) -> Collapse:
    """The model with layers collapsed into one another.

    Args:
        model: The model.
        batches: Token ids on which its last hidden states are compared.
        num_dropped: R.
        num_merged: m, layers that are added to one at once.
        lowest: The lowest layer that others may be added to.
        interval: Layers between two that others were added to.
        threshold: Least mean cosine between old and new hidden states.
        step: By which the threshold falls where too few layers went.

    Raises:
        InputError: nothing would be kept, or R layers can't be collapsed above `lowest`.
    """
    path = stack_path(model)
    layers: Any = model.get_submodule(path)
    _check_number(model, num_dropped)
    wanted = _last_hidden(model, path, batches)
    while threshold >= _LEAST_THRESHOLD:
        places = _collapsed(
            model, path, batches, wanted, num_dropped, (num_merged, lowest, interval), threshold
        )
        if len(places) == len(layers) - num_dropped:
            with _stacked(model, path, places):
                made = copy.deepcopy(model)
            return Collapse(model=made, groups=tuple(place.group for place in places), threshold=threshold)
        threshold -= step
    raise InputError(
        f"LaCo: {num_dropped} layers can't be collapsed from layer {lowest} on by {num_merged} at once"
    )


class _Place(NamedTuple):
    """What stands in a place of the model as it is folded.

    Attributes:
        layer: The module.
        group: Numbers of the layers that it was made of, ascending.
    """

    layer: nn.Module
    group: tuple[int, ...]


def _collapsed(
    model: Any,
    path: str,
    batches: Batches,
    wanted: list[Tensor],
    num_dropped: int,
    shape: tuple[int, int, int],
    threshold: float,
) -> list[_Place]:
    """The places after one descent."""
    num_merged, lowest, interval = shape
    places = [_Place(layer, (number,)) for number, layer in enumerate(model.get_submodule(path))]
    smallest = len(places) - num_dropped
    at = len(places) - 2
    while at >= lowest and len(places) > smallest:
        end = min(at + num_merged, at + len(places) - smallest, len(places) - 1) + 1
        trial = [*places[:at], _folded(places[at:end]), *places[end:]]
        with _stacked(model, path, trial):
            found = _last_hidden(model, path, batches)
        cosines = torch.cat([_cosine(a, b).flatten() for a, b in zip(wanted, found, strict=True)])
        if float(cosines.double().mean()) > threshold:
            places = trial
            at = min(at - interval, len(places) - 2)
        else:
            at -= 1
    return places


def _folded(places: Sequence[_Place]) -> _Place:
    """One place of several: to the first is added how the others, as they now are, differ from it."""
    first, *others = places
    made = copy.deepcopy(first.layer)
    theirs = [other.layer.state_dict() for other in others]
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if value.is_floating_point():
                start = value.float()
                value.copy_(start + sum(other[name].float() - start for other in theirs))
    return _Place(made, tuple(number for place in places for number in place.group))


@contextmanager
def _stacked(model: Any, path: str, places: Sequence[_Place]) -> Iterator[None]:
    """Inside the block the model has other layers, and a config that fits them."""
    parent, _, last = path.rpartition(".")
    body = model.get_submodule(parent)
    before = getattr(body, last)
    configs = [(module, module.config) for module in model.modules() if "config" in module.__dict__]
    config = fitted_config(model.config, [place.group[0] for place in places])
    try:
        setattr(body, last, nn.ModuleList(place.layer for place in places))
        for number, place in enumerate(places):
            PlacedLayer(place.layer).renumber(number)
        for module in model.modules():
            replace_config(module, config)
        yield
    finally:
        setattr(body, last, before)
        for module, config in configs:
            module.config = config
        for number, layer in enumerate(before):
            PlacedLayer(layer).renumber(number)


def _last_hidden(model: Any, path: str, batches: Batches) -> list[Tensor]:
    """What comes out of the last layer."""
    found: list[Tensor] = []
    _each_batch(model, batches, lambda hidden: found.append(hidden[-1]), path)
    return found


def _check_number(model: nn.Module, num_dropped: int) -> int:
    """The depth of a model that can lose so many layers."""
    depth = len(model.get_submodule(stack_path(model)))  # type: ignore[arg-type]
    if not 0 <= num_dropped < depth:
        raise InputError(f"{num_dropped} of {depth} layers to drop, expected 0..{depth - 1}")
    return depth


def _each_batch(
    model: Any, batches: Batches, look: Callable[[list[Tensor]], None], path: str | None = None
) -> None:
    """Run batches; `look` sees the l + 1 states of the residual stream of each."""
    if not batches:
        raise InputError("no batches: give token ids to compare layers on")
    layers: Any = model.get_submodule(path or stack_path(model))
    hidden: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple) else output).detach())

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            hidden.clear()
            with torch.inference_mode():
                model(input_ids=batch.to(model.device), use_cache=False)
            look(list(hidden))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _nats(model: Any, batches: Batches) -> float:
    """Mean negative log-likelihood of the tokens after the first."""
    if not batches:
        raise InputError("no batches: give token ids to measure perplexity on")
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(nats), count + ids[:, 1:].numel()
    return total / count if math.isfinite(total) else math.inf


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)
