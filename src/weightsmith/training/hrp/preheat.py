"""The large adapter: put beside the small one, trained for a few steps, and gone again without a trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.runs.progress import Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.hrp.layers import PREFIX, Layer, find_layers, lora_modules
from weightsmith.training.hrp.options import MOST_RANK, RATE, HRPOptions

log = logging.getLogger(__name__)

PREHEAT = "__hrp_preheat__"
Step = Callable[[int], float]
"""Accumulates the gradients of one step of the preheat, by its number, and tells its loss."""


def preheat_ranks(layers: Sequence[Layer], adapter: str, options: HRPOptions) -> dict[str, int]:
    """Rank of the large adapter in each layer.

    Raises:
        InputError: a rank no larger than the small adapter's; a pattern without a layer.
    """
    given, found, narrow = options.preheat_rank, {}, {}
    unused = set(given) if isinstance(given, Mapping) else set()
    for layer in layers:
        own, most = layer.module.r[adapter], min(layer.sides)
        if isinstance(given, Mapping):
            matching = [p for p in given if re.fullmatch(rf"(.*\.)?({p})", layer.name)]
            unused -= set(matching)
            wanted = given[matching[0]] if matching else None
        else:
            wanted = given
        usual = wanted is None
        if wanted is None:
            wanted = min(MOST_RANK, 16 * own)
        if wanted <= own and not options.force:
            raise InputError(
                f"preheat_rank must be above the adapter's rank: {layer.name} has r={own}, "
                f"{'the default is' if usual else 'found'} {wanted} (force=True allows it)"
            )
        found[layer.name] = min(wanted, most)
        if wanted > own >= most:
            narrow[layer.name] = most
    if narrow:
        log.warning(
            "HRP: preheat_rank is cut to the smaller side of a layer, which the adapter's own rank fills: %s",
            ", ".join(f"{name} ({most})" for name, most in narrow.items()),
        )
    if unused:
        raise InputError(
            f"preheat_rank: {sorted(unused)[0]!r} matches no layer; names are like {layers[0].name}"
        )
    return found


@contextlib.contextmanager
def large_adapter(
    model: nn.Module, adapter: str, layers: Sequence[Layer], ranks: Mapping[str, int], options: HRPOptions
) -> Iterator[list[Layer]]:
    """The large adapter, active and alone in training; afterwards everything is as it was.

    Which parameters are trained, training mode of every module, the active adapter and all random states come
    back, also after an error. The layers yielded are those of `layers`, in their order.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    active, states = active_adapter(model), _random_states()
    scales = {layer.name: layer.module.scaling[adapter] for layer in layers}
    try:
        _add(model, _config(model, adapter, ranks))
        by_module = {id(layer.module): layer for layer in find_layers(model, PREHEAT)[0]}
        large = [by_module[id(layer.module)] for layer in layers if id(layer.module) in by_module]
        _set_active(model, PREHEAT)
        model.requires_grad_(False)
        for layer in large:
            _begin(layer, scales[layer.name], layer.module.r[adapter], options)
        model.eval()
        with _checkpointing(model):
            yield large
    finally:
        _set_active(model, active)
        if PREHEAT in peft_configs(model):
            _delete(model, PREHEAT)
        else:  # PEFT broke off while it added it
            for _, module in lora_modules(model):
                if PREHEAT in module.r:
                    module.delete_adapter(PREHEAT)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        for module, mode in modes.items():
            module.training = mode
        _set_random_states(states)


@contextlib.contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing goes on in a model whose modules are in evaluation.

    It works in training mode alone, so the innermost modules that have it, as a rule the layers that run
    twice, are in training; but not while they run, since many drop out by function.
    """
    having = {
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True
    }
    innermost = [module for module in having if having.isdisjoint(list(module.modules())[1:])]
    usual = {
        module: module._gradient_checkpointing_func
        for module in innermost
        if hasattr(module, "_gradient_checkpointing_func")  # else its own forward calls PyTorch's
    }
    for module in innermost:
        module.training = True
    for module, function in usual.items():
        module._gradient_checkpointing_func = functools.partial(_in_evaluation, module, function)  # type: ignore
    try:
        yield
    finally:
        for module, function in usual.items():
            module._gradient_checkpointing_func = function


def _in_evaluation(module: nn.Module, checkpoint: Any, run: Any, *inputs: Any, **more: Any) -> Any:
    """A checkpoint around a module that is in evaluation while it runs, in the backward pass too."""

    def running(*inputs: Any, **more: Any) -> Any:
        module.training = False
        try:
            return run(*inputs, **more)
        finally:
            module.training = True

    return checkpoint(running, *inputs, **more)


def train(
    layers: Sequence[Layer],
    step: Step,
    steps: int,
    options: HRPOptions,
    *,
    everywhere: bool,
    progress: Progress,
) -> list[float]:
    """Train the large adapter; the loss of every step.

    Args:
        layers: Its layers.
        step: Runs forward and backward.
        steps: How many.
        options: Optimiser and what is trained.
        everywhere: Average gradients over all processes.
        progress: Told about each step.

    Raises:
        InputError: a loss that is no number.
    """
    parameters = []
    for layer in layers:
        left, right = layer.parameters(PREHEAT)
        parameters += [left, right] if options.trainable == "both" else [left]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = _optimizer(parameters, options)
    rate = optimizer.param_groups[0]["lr"]
    losses = []
    progress.start("preheating", steps, "steps")
    try:
        for number in range(steps):
            optimizer.zero_grad()
            loss = step(number)
            if everywhere:
                loss = _average(parameters, loss)
            if not math.isfinite(loss):
                raise InputError(
                    f"preheat: the loss is {loss} in step {number + 1} of {steps}; lower its learning rate "
                    f"(now {float(rate):g}). The model is as it was"
                )
            optimizer.step()
            losses.append(loss)
            progress.advance(1)
    finally:
        for parameter in parameters:
            parameter.grad = None
    progress.done()
    if losses[-1] > losses[0] + 0.2 * abs(losses[0]):
        log.warning(
            "HRP: the preheat raised the loss from %.4g to %.4g; a lower learning rate (now %g) may help",
            losses[0],
            losses[-1],
            rate,
        )
    return losses


def active_adapter(model: Any) -> str | None:
    """The adapter in use.

    Raises:
        InputError: there are several.
    """
    active = model.active_adapters
    active = active() if callable(active) else active  # transformers' and diffusers' own models
    if len(active) > 1:
        raise InputError(f"HRP needs one active adapter, found {', '.join(active)}")
    return active[0] if active else None


def peft_configs(model: Any) -> dict[str, Any]:
    """PEFT's configurations by adapter."""
    return getattr(model, "peft_config", None) or {}


def replace_adapter(model: Any, adapter: str, ranks: Mapping[str, int], layers: Sequence[Layer]) -> None:
    """Make an adapter anew with other ranks and the same scales. Whatever of it has the shape that it had,
    such as modules that are trained whole, keeps its values.
    """
    config = copy.deepcopy(peft_configs(model)[adapter])
    config.layer_replication = None  # done when the first adapter came
    ties = getattr(config, "ensure_weight_tying", False)
    if ties:  # PEFT has found them, and would look for others in layers that it has wrapped
        config.ensure_weight_tying = False
    for layer in layers:
        if layer.name in ranks:
            rank, scale = ranks[layer.name], layer.module.scaling[adapter]
            alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
            for pattern in (f"^{re.escape(name)}" for name in (layer.name, *layer.twins)):
                config.rank_pattern = {pattern: rank, **config.rank_pattern}
                config.alpha_pattern = {pattern: alpha, **config.alpha_pattern}
    before = {name: tensor.detach().clone() for name, tensor in _own_tensors(model, adapter)}
    # PEFT wants an adapter to be there meanwhile.
    with large_adapter(model, adapter, layers, {layer.name: 1 for layer in layers}, HRPOptions()):
        _delete(model, adapter)
        _add(model, (adapter, config))
        for layer in layers:
            layer.tie(adapter)
        if ties:
            peft_configs(model)[adapter].ensure_weight_tying = True
    for name, tensor in _own_tensors(model, adapter):
        if name in before and before[name].shape == tensor.shape:
            tensor.data.copy_(before[name])


def _own_tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of an adapter."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return ((name, tensor) for name, tensor in tensors if adapter in name.split("."))


def _config(model: Any, adapter: str, ranks: Mapping[str, int]) -> tuple[str, Any]:
    """The large adapter's configuration: the small one's, but for rank, scale and what else it would
    train.
    """
    config = copy.deepcopy(peft_configs(model)[adapter])
    # Kinds of layers that HRP doesn't know keep a rank that is known to fit them.
    own = {
        name.removeprefix(PREFIX): module.r[adapter]
        for name, module in lora_modules(model)
        if adapter in module.r
    }
    ranks = own | dict(ranks)
    usual = max(ranks.values())
    config.r = config.lora_alpha = usual
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config.alpha_pattern = dict(config.rank_pattern)
    config.init_lora_weights, config.lora_dropout, config.use_rslora = True, 0.0, False
    config.bias, config.modules_to_save, config.layer_replication = "none", None, None
    if getattr(config, "trainable_token_indices", None) is not None:
        config.trainable_token_indices = None
    config.inference_mode = False
    if getattr(config, "ensure_weight_tying", False):
        # Layers that PEFT has tied to others get what is found where these are.
        config.ensure_weight_tying = False
        config.modules_to_tie = config.target_modules_to_tie = None
    return PREHEAT, config


def _begin(layer: Layer, scale: float, own: int, options: HRPOptions) -> None:
    """First factors and scale of a layer of the large adapter; the same on every device and process."""
    left, right = layer.left(PREHEAT), layer.right(PREHEAT)
    experts, size, rank = right.shape
    source = torch.Generator().manual_seed(derive(options.seed, "hrp", layer.name) % 2**63)
    if options.preheat_a == "orthonormal" and rank <= size:
        drawn = torch.randn(experts, size, rank, generator=source)
        # QR leaves the signs to the library; with a positive diagonal the result is the matrix's own.
        basis, triangle = torch.linalg.qr(drawn)
        basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    else:
        basis = (2 * torch.rand(experts, size, rank, generator=source) - 1) / math.sqrt(size)
    layer.write(PREHEAT, torch.zeros_like(left), basis.to(right.device))
    if options.preheat_scale == "rank_stabilized":
        layer.module.scaling[PREHEAT] = scale * math.sqrt(own / rank)
    elif options.preheat_scale == "same":
        layer.module.scaling[PREHEAT] = scale
    else:
        layer.module.scaling[PREHEAT] = float(options.preheat_scale) / rank


def _optimizer(parameters: list[Any], options: HRPOptions) -> Any:
    rate = options.preheat_lr or RATE
    if callable(options.preheat_optimizer):
        return options.preheat_optimizer(parameters)
    if options.preheat_optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def _average(parameters: Sequence[Tensor], loss: float) -> float:
    """Mean of gradients over processes, in one exchange; and of the loss, so that all decide alike about
    it.
    """
    for parameter in parameters:
        if parameter.grad is None:  # no gradient here may be one elsewhere
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat(
        [gradient.flatten().float() for gradient in gradients] + [gradients[0].new_tensor([loss])]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


def _add(model: Any, named: tuple[str, Any]) -> None:
    from peft import PeftModel
    from peft.functional import inject_adapter_in_model

    name, config = named
    with warnings.catch_warnings():
        # That tied embeddings have adapters was told when the first was made.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        if isinstance(model, PeftModel):
            # Not what subclasses make of it: they would train a classifier beside.
            PeftModel.add_adapter(model, name, config)
        else:
            inject_adapter_in_model(config, model, name)


def _delete(model: Any, name: str) -> None:
    from peft import PeftModel
    from peft.functional import delete_adapter

    if isinstance(model, PeftModel):
        model.delete_adapter(name)
    else:
        delete_adapter(model, name, prefix="lora_")
        model.peft_config.pop(name, None)


def _set_active(model: Any, name: str | None) -> None:
    from peft import PeftModel
    from peft.functional import set_adapter

    if name is None:
        return
    if isinstance(model, PeftModel):
        model.set_adapter(name)
    else:
        set_adapter(model, name)


def _random_states() -> list[Any]:
    devices = [torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *devices]


def _set_random_states(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for devices in states[3:]:
        torch.cuda.set_rng_state_all(devices)
