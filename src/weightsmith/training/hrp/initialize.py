"""HRP: a LoRA adapter begins in the direction that a much larger one took in a few steps.

Problem  A LoRA adapter moves a matrix within the row space of A, and A begins at random: with a small rank,
         or an A that is frozen, training has to do with a space that the task did not choose.
Method   Beside the adapter of rank r a second one of rank R is trained for a few steps. The r leading right
         singular vectors of its product B A^T become the rows of the small one's A; its B stays 0, so the
         model is the base still. The large adapter, and its optimiser, are gone before training begins.
         Weights are never touched, so quantised ones will do.
Source   Chen, Wang, Fu, Shen, Jing, Tian, Tao, arXiv:2502.07739, which has no public code: that the singular
         vectors are unit rows of A beside a B of 0, the preheat's rank, length, optimiser and scale are this
         library's reading, each an option (`HRPOptions`).
Cost     `preheat_steps` steps with an adapter of rank R, 16 bytes (M + N) R a layer meanwhile; then two QRs
         of it and an SVD of R x R. Nothing of the size of a weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightsmith.errors import InputError, require
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive
from weightsmith.training.hrp import preheat
from weightsmith.training.hrp.factors import shared_ranks
from weightsmith.training.hrp.layers import PREFIX, Layer, find_layers
from weightsmith.training.hrp.options import HRPOptions
from weightsmith.training.hrp.products import Product
from weightsmith.training.hrp.report import HRPReport, LayerReport, read_cache, write_cache
from weightsmith.training.hrp.state import LEFT, check_state, names_of, ranks_of, stacked
from weightsmith.training.hrp.steps import TrainStep, model_loss, step_of

log = logging.getLogger(__name__)

_OWN_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")


def initialize_lora_hrp_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    train_step: TrainStep | None = None,
    hrp_state_dict: Mapping[str, Tensor] | None = None,
    options: HRPOptions | None = None,
    forward_fn: Callable[[nn.Module, Any], Tensor] = model_loss,
    adapter_name: str = "default",
    cache_file: str | Path | None = None,
    overwrite: bool = False,
    gather: bool = True,
    show_progress_bar: bool = True,
    progress: Progress | None = None,
    **keywords: Any,
) -> HRPReport:
    """Give a fresh LoRA adapter the direction that the task wants, in place.

    Call it after `get_peft_model` and before the optimiser is made. Without a state dict, exactly one of
    `dataloader` and `train_step` trains the large adapter. In several processes each sees its own batches,
    gradients are averaged, and all end with the bits of the first one; the model may be sharded by FSDP2.

    Args:
        model: A `PeftModel` with LoRA, or a model with one put in by transformers' own `add_adapter`.
        dataloader: Batches of the fine-tuning data; read again from the start where they are too few.
        train_step: Takes the model and the number of the step, and returns the loss to go down, one number;
            HRP runs its backward pass.
        hrp_state_dict: Directions of an earlier call (`get_hrp_state_dict`); nothing is trained.
        options: Settings; fields of `HRPOptions` may be given as keywords instead.
        forward_fn: Loss of the model on one batch of `dataloader`.
        adapter_name: The adapter to initialise.
        cache_file: Safetensors file that keeps the directions: read if it is there, else written. One found
            with other options, another adapter or a base of other shapes is refused; data and values of the
            weights it can't tell.
        overwrite: Initialise an adapter that has been trained already, which forgets what it learnt.
        gather: Average gradients over processes; false where every process reads the same batches.
        show_progress_bar: Show the steps of the preheat.
        progress: Told about them instead.

    Returns:
        What was found, by layer.

    Raises:
        InputError: no LoRA model, an adapter that is trained or stands on changed weights, no data or two
            kinds of it, a loss that is no number or has no gradient, a state dict or cache of something else
            or with values that are no numbers. The model is as it was.
        MissingExtraError: peft is not installed.
    """
    made = _Call(model, options, adapter_name, overwrite, keywords)
    if hrp_state_dict is not None:
        if dataloader is not None or train_step is not None:
            raise InputError(
                "HRP: with hrp_state_dict nothing is trained: leave dataloader and train_step out"
            )
        made.load(hrp_state_dict)
        return HRPReport(layers={}, losses=(), steps=0, skipped=tuple(made.skipped))
    steps = made.options.steps_of(None)
    identity = made.identity(steps)
    cached = read_cache(cache_file, identity) if cache_file is not None else None
    if cached is not None:
        made.load(cached[0])
        return cached[1]
    step = step_of(model, dataloader, train_step, forward_fn, steps)
    state, report = made.found(step, steps, gather, _bar(progress, show_progress_bar), apply=True)
    if cache_file is not None and _rank() == 0:
        write_cache(cache_file, identity, state, report)
    return report


def get_hrp_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    train_step: TrainStep | None = None,
    options: HRPOptions | None = None,
    forward_fn: Callable[[nn.Module, Any], Tensor] = model_loss,
    adapter_name: str = "default",
    gather: bool = True,
    show_progress_bar: bool = True,
    progress: Progress | None = None,
    **keywords: Any,
) -> dict[str, Tensor]:
    """Directions of every layer for `initialize_lora_hrp_weights(hrp_state_dict=...)`; the model stays as it
    is.

    Arguments and errors are those of `initialize_lora_hrp_weights`.

    Returns:
        Rows for A, (r, in features) fp32 on the CPU, by the layer's name; with `assign` other than `A`
        columns for B, (out features, r), by the name and `:B`.
    """
    made = _Call(model, options, adapter_name, True, keywords)
    steps = made.options.steps_of(None)
    step = step_of(model, dataloader, train_step, forward_fn, steps)
    return made.found(step, steps, gather, _bar(progress, show_progress_bar), apply=False)[0]


def take_ranks(
    model: nn.Module, ranks: Mapping[str, int], origin: object, *, adapter_name: str = "default"
) -> None:
    """Give an adapter the ranks that an earlier initialisation gave it, before its weights are loaded.

    Args:
        model: As of `initialize_lora_hrp_weights`.
        ranks: Of every layer, by name.
        origin: Where they come from; for messages.
        adapter_name: The adapter.

    Raises:
        InputError: the layers are not those of the adapter.
    """
    made = _Call(model, None, adapter_name, True, {})
    names = {layer.name for layer in made.layers}
    if names != ranks.keys():
        other = sorted(names ^ ranks.keys())[0]
        raise InputError(f"{origin} is of another adapter: {other} is in one of the two alone")
    made.take_ranks(ranks)


class _Call:
    """One initialisation: what it is about, checked."""

    def __init__(
        self,
        model: Any,
        options: HRPOptions | None,
        adapter: str,
        overwrite: bool,
        keywords: Mapping[str, Any],
    ) -> None:
        require("peft", extra="hf", needed_by="HRP")
        self.model, self.adapter, self.options = model, adapter, HRPOptions.of(options, **keywords)
        configs = preheat.peft_configs(model)
        if not configs:
            hint = "; give the model inside DDP" if hasattr(model, "module") else ""
            raise InputError(f"model must be a PeftModel; call get_peft_model first{hint}")
        if adapter not in configs:
            raise InputError(f"the model has no adapter `{adapter}`, found {', '.join(configs)}")
        from peft import PeftMixedModel

        if isinstance(model, PeftMixedModel):
            raise InputError("HRP needs get_peft_model(mixed=False), found a PeftMixedModel")
        config = configs[adapter]
        if not hasattr(config, "init_lora_weights"):
            raise InputError(f"adapter `{adapter}` is a {type(config).__name__}; HRP needs LoRA")
        preheat.active_adapter(model)
        start = str(config.init_lora_weights).lower()
        if start.startswith(_OWN_WEIGHTS):
            raise InputError(
                f"init_lora_weights={config.init_lora_weights!r} has begun the adapter from the weights, or "
                "changed them; HRP needs init_lora_weights=True"
            )
        self.layers, self.skipped = find_layers(model, adapter)
        if not self.layers:
            raise InputError(
                f"adapter `{adapter}` has no layer that HRP knows (linear, embedding, convolution without "
                "groups)"
            )
        for layer in self.layers:
            if self.options.rank_energy is not None and layer.is_sharded(adapter):
                raise InputError(
                    f"rank_energy: {layer.name} is sharded, and factors of another rank would not be; "
                    "initialise before fully_shard"
                )
            if layer.module.merged:
                raise InputError(f"{layer.name}: adapters are merged into the weights; unmerge them first")
            if not overwrite and bool(layer.left(adapter).any()):
                raise InputError(
                    f"{layer.name}: B of adapter `{adapter}` is not 0: it is trained, or begun so "
                    f"(init_lora_weights={config.init_lora_weights!r}), and HRP would discard it; give a "
                    "fresh adapter, or overwrite=True to initialize_lora_hrp_weights"
                )
        if self.skipped:
            log.warning("HRP: no direction for %s: kinds of layers it doesn't know", ", ".join(self.skipped))

    def identity(self, steps: int) -> dict[str, str]:
        """What decides the directions: options (functions by their names), the adapter's variant, ranks and
        scales, names and shapes of the base's parameters. Not their values, nor what the base's config says
        beside them, the data or the loss.
        """
        own = {name: getattr(value, "__qualname__", str(value)) for name, value in vars(self.options).items()}
        own["preheat_steps"] = str(steps)
        own["use_dora"] = str(preheat.peft_configs(self.model)[self.adapter].use_dora)
        own["base"] = self._base()
        ranks = preheat.preheat_ranks(self.layers, self.adapter, self.options)
        for layer in self.layers:
            module = layer.module
            own[f"layer {layer.name}"] = (
                f"r={module.r[self.adapter]} R={ranks[layer.name]} scale={module.scaling[self.adapter]}"
            )
        return own

    def _base(self) -> str:
        """A digest of names and shapes of the parameters that belong to no adapter."""
        adapters = set(preheat.peft_configs(self.model))
        shapes = {
            name.removeprefix(PREFIX).replace(".base_layer", ""): list(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if adapters.isdisjoint(name.split("."))
        }
        return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]

    def found(
        self, step: preheat.Step, steps: int, gather: bool, progress: Progress, *, apply: bool
    ) -> tuple[dict[str, Tensor], HRPReport]:
        """Directions by preheating; written to the adapter with `apply`."""
        ranks = preheat.preheat_ranks(self.layers, self.adapter, self.options)
        joint = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        seconds = [time.perf_counter()]
        with preheat.large_adapter(self.model, self.adapter, self.layers, ranks, self.options) as large:
            losses = preheat.train(
                large, step, steps, self.options, everywhere=joint and gather, progress=progress
            )
            seconds.append(time.perf_counter())
            state, reports = self._extract(large, joint=joint)
            if joint:
                for tensor in state.values():
                    _share(tensor)
            seconds.append(time.perf_counter())
        if apply:
            self.take_ranks(ranks_of(state))
            self._write(state)
        report = HRPReport(
            layers=reports,
            losses=tuple(losses),
            steps=steps,
            skipped=tuple(self.skipped),
            preheat_seconds=seconds[1] - seconds[0],
            extract_seconds=seconds[2] - seconds[1],
        )
        return state, report

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Write directions that were found before.

        Raises:
            InputError: names or shapes that aren't those of the adapter's layers, or values that are no
                numbers.
        """
        check_state(state, self.layers, self.adapter, self.options)
        self.take_ranks(ranks_of(state))
        self._write(state)

    def take_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give layers of the adapter other ranks."""
        changed = {
            layer.name: ranks[layer.name]
            for layer in self.layers
            if ranks[layer.name] != layer.module.r[self.adapter]
        }
        if changed:
            preheat.replace_adapter(self.model, self.adapter, changed, self.layers)

    @torch.no_grad()
    def _extract(
        self, large: Sequence[Layer], *, joint: bool
    ) -> tuple[dict[str, Tensor], dict[str, LayerReport]]:
        """Directions and what is told of each layer."""
        products = {layer.name: Product(layer) for layer in large}
        ranks = {layer.name: layer.module.r[self.adapter] for layer in self.layers}
        if self.options.rank_energy is not None:
            shared = [layer for layer in large if layer.kind != "experts" and products[layer.name].usable]
            spectra = [products[layer.name].spectrum() for layer in shared]
            own = [ranks[layer.name] for layer in shared]
            new = torch.tensor(shared_ranks(spectra, own, self.options.rank_energy))
            if joint:  # shapes of what is shared below
                _share(new)
            ranks |= zip((layer.name for layer in shared), new.tolist(), strict=True)
        state: dict[str, Tensor] = {}
        reports: dict[str, LayerReport] = {}
        for layer in self.layers:
            dtype = layer.parameters(self.adapter)[1].dtype
            directions, reports[layer.name] = products[layer.name].directions(
                ranks[layer.name],
                derive(self.options.seed, "fill", layer.name),
                self.options,
                layer.module.scaling[self.adapter],
                dtype,
            )
            for name in names_of(layer, self.options):
                state[name] = directions[1 if name.endswith(LEFT) else 0].cpu().contiguous()
        broken = [name for name, report in reports.items() if report.fallback == "not finite"]
        if 2 * len(broken) > len(reports):
            raise InputError(
                f"preheat: {len(broken)} of {len(reports)} layers have NaN or infinite factors; lower "
                "the preheat's learning rate. The model is as it was"
            )
        for name, report in reports.items():
            if report.fallback is not None:
                log.warning("HRP: %s keeps a random direction: %s", name, report.fallback)
        return state, reports

    def _write(self, state: Mapping[str, Tensor]) -> None:
        for layer in self.layers:
            left, right = layer.left(self.adapter), layer.right(self.adapter)
            new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
            if self.options.assign != "B":
                new_right = stacked(state[layer.name]).mT.to(right)
            if self.options.assign != "A":
                new_left = stacked(state[layer.name + LEFT]).to(left)
            layer.write(self.adapter, new_left, new_right)


class _Bar:
    """A progress bar as other parts of PEFT show it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, label: str, total: float, unit: str) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc=f"HRP: {label}", unit=unit)

    def advance(self, amount: float) -> None:
        self._bar.update(amount)

    def done(self) -> None:
        self._bar.close()


def _bar(progress: Progress | None, shown: bool) -> Progress:
    return progress if progress is not None else _Bar() if shown and _rank() == 0 else SILENT


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _share(tensor: Tensor) -> None:
    """Every process takes the first one's bits: libraries of different machines leave others."""
    if dist.get_backend() == "nccl":  # knows no CPU memory
        moved = tensor.cuda()
        dist.broadcast(moved, 0)
        tensor.copy_(moved)
    else:
        dist.broadcast(tensor, 0)
