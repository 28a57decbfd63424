"""A mediated model that answers: a Hugging Face causal language model whose experts are chosen for each
prompt.
"""

from __future__ import annotations

import inspect
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import CheckpointError, InputError, require
from weightsmith.merging.mediator.export import export_merged
from weightsmith.merging.mediator.options import RouterConfig
from weightsmith.merging.mediator.router import Router, RoutingDecision, fit_router
from weightsmith.merging.mediator.serving import Mix, Mode, Serving, find_targets
from weightsmith.merging.mediator.store import FACTS, ROUTER, MediatorStore, router_bytes
from weightsmith.runs.atomic import write_bytes

log = logging.getLogger(__name__)

Given = str | Mapping[str, float]
"""A task, or a weight for each task."""
Prompt = str | Sequence[int]

_NGRAMS = (1, 2, 3)


class _Reached(Exception):
    """Stops a forward pass at the block whose output was wanted."""


class Mediator:
    """A mediated model. Make one with `Mediator.from_pretrained`.

    It behaves as the model it wraps: what is not defined here (`config`, `device`, `num_parameters` ...) is
    the wrapped model's. `model` itself is an ordinary `PreTrainedModel`, for the Trainer and for pipelines;
    it routes too.

    Attributes:
        model: The wrapped model. Its forward pass decides for each sequence at prefill, and keeps to that
        while
            the cache is filled.
        store: Averaged, dense and sparse parts.
        router: What decides; None until it is fitted.
        tokenizer: Of the folder; None where there is none.
        decisions: Those of the last prefill.
        counts: (task, branch) -> prompts so far. A growing share of `ood` says that requests drift away from
            what the router knows.
    """

    def __init__(
        self,
        model: Any,
        store: MediatorStore,
        *,
        tokenizer: Any = None,
        mode: Mode = "delta",
        cache_size: int = 2,
    ) -> None:
        self.model, self.store, self.tokenizer = model, store, tokenizer
        self.serving = Serving(model, store, mode, cache_size)
        self.router = Router.from_tensors(*store.router) if store.router else None
        self.decisions: list[RoutingDecision] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self._pinned: list[RoutingDecision] | None = None
        self._looking = False
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        mode: Mode = "delta",
        device: str | torch.device | None = None,
        dtype: str = "auto",
        cache_size: int = 2,
    ) -> Self:
        """Load a mediated model.

        Args:
            folder: What `build_mediator` or `save_pretrained` made.
            mode: `delta` mixes tasks in one batch and keeps experts sparse; `materialize` merges once for
            each
                mix, for batches of one task.
            device: Where to put it.
            dtype: Of the weights; as stored by default.
            cache_size: Mixes whose merged parameters are kept.

        Raises:
            CheckpointError: it is no mediated model, or a file of it is missing.
            MissingExtraError: transformers is not installed.
        """
        transformers = require("transformers", extra="hf", needed_by="Mediator")
        from weightsmith.evaluation.models import first_line, without_bars

        store = MediatorStore.open(folder)
        try:
            path = store.checkpoint.path
            with without_bars():
                try:
                    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
                except (OSError, ValueError, RuntimeError) as problem:
                    raise CheckpointError(
                        f"{store.checkpoint.name}: can't be loaded as a causal language model: "
                        f"{first_line(problem)}"
                    ) from problem
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            except (OSError, ValueError, KeyError):
                tokenizer = None  # asked for only where prompts are text
            if device is not None:
                model = model.to(device)
            return cls(model.eval(), store, tokenizer=tokenizer, mode=mode, cache_size=cache_size)
        except BaseException:
            store.close()
            raise

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts, in the order of `RoutingDecision.weights`."""
        return self.store.tasks

    def fit_router(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        tokenizer: Any = None,
        *,
        config: RouterConfig | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Router:
        """Learn which task a prompt belongs to.

        Args:
            prompts: By task, texts or token ids; 64 or more each, none of those that are reported on.
            tokenizer: For texts, and kept for `feature: text`; the folder's own by default.
            config: The router's options; those the model was built with by default.
            batch_size: Prompts at once.
            seed: Which fifth calibrates the temperature.

        Raises:
            InputError: prompts of a task that has no expert, or an expert without prompts.
        """
        self.tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        for task in prompts:
            self.store.weights_of(task)
        for task in self.tasks:
            if not prompts.get(task):
                raise InputError(f"router: task `{task}` has no prompts; expected 8 or more")
        config = config or self.store.config.router
        features = {
            task: self._features_of([self._ids(prompt) for prompt in prompts[task]], config, batch_size)
            for task in self.tasks
        }
        self.router = fit_router(features, config, seed)
        self.store.router = self.router.to_tensors()
        return self.router

    def route(self, prompts: Prompt | Sequence[Prompt] | Mapping[str, Tensor]) -> list[RoutingDecision]:
        """What would answer each prompt: texts, token ids, or a tokenizer's output.

        Raises:
            RuntimeError: the router was not fitted.
        """
        if isinstance(prompts, Mapping):
            return self._decide(prompts["input_ids"], prompts.get("attention_mask"))
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: Sequence[Any] = [prompts] if one else prompts
        return self._decide(*self._padded([self._ids(prompt) for prompt in listed]))

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        task_id: str | Sequence[str] | None = None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        return_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate; each sequence keeps to the experts that its prompt was given.

        Args:
            inputs: Prompts (B, L), or `input_ids` among the others.
            task_id: A task for all sequences, or one for each: the router is not asked.
            weights: Weights of the experts in its place.
            return_routing: Return the decisions too.
            **kwargs: As the wrapped model's `generate` takes them.

        Returns:
            What the wrapped model returns, and with `return_routing` the list of `RoutingDecision`s.

        Raises:
            RuntimeError: neither a task, nor weights, nor a fitted router.
            InputError: no such task, or not one for each sequence.
        """
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if ids is None:
            raise InputError("generate: expected prompts as token ids (B, L)")
        given = task_id if task_id is not None else weights
        if given is None:
            decisions = self._decide(ids, kwargs.get("attention_mask"))
        else:
            decisions = self._given(given, len(ids))
        with self._pin(decisions):
            made = self.model.generate(ids, **kwargs)
        return (made, decisions) if return_routing else made

    @contextmanager
    def using(self, given: Given | Sequence[Given]) -> Iterator[None]:
        """Inside the block every forward pass uses this task, these weights, or one of them for each
        sequence.
        """
        with self._pin(self._given(given, 1)):
            yield

    @contextmanager
    def for_prompts(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Inside the block forward passes are on continuations of these prompts: decided on the prompts
        alone.
        """
        with self._pin(self._decide(*self._padded(prompts))):
            yield

    def add_expert(self, task: str, model: str | Path, *, base: str | Path | None = None) -> None:
        """Take in one more fine-tune. Until `fit_router` is called again only `task_id` reaches it.

        Raises:
            As `MediatorStore.add_expert`.
        """
        self.serving.forget()
        self._refresh(self.store.add_expert(task, model, base=base))
        if self.router is not None:
            log.warning("the router does not know `%s`: only task_id reaches it until fit_router", task)

    def remove_expert(self, task: str, model: str | Path | None = None) -> None:
        """Take an expert out; its fine-tune is needed to take it out of the averaged blocks too.

        Raises:
            As `MediatorStore.remove_expert`.
        """
        self.serving.forget()
        self._refresh(self.store.remove_expert(task, model))
        if self.router is not None and task in self.router.tasks:
            self.router = self.router.without(task)
            self.store.router = self.router.to_tensors()

    def save_pretrained(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder that `from_pretrained` opens. Raises as `MediatorStore.save`."""
        return self.store.save(out, overwrite=overwrite)

    def save_router(self) -> None:
        """Put the fitted router into the folder that this model was loaded from.

        Raises:
            RuntimeError: it was not fitted.
            SystemFault: the disk is full or failed.
        """
        if self.store.router is None:
            raise RuntimeError(_NOT_FITTED)
        folder = self.store.checkpoint.path
        write_bytes(folder / ROUTER, router_bytes(*self.store.router))
        write_bytes(folder / FACTS, self.store.facts())

    def export_merged(self, mix: Given, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write a plain checkpoint for one task or one mix. Raises as `export.export_merged`."""
        return export_merged(self.store, mix, out, overwrite=overwrite)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the wrapped model, or change its dtype."""
        self.serving.use(None)
        self.model.to(*args, **kwargs)
        self.serving.moved()
        return self

    def eval(self) -> Self:
        """Evaluation mode."""
        self.model.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode, for symmetry; a mediated model is not trained."""
        self.model.train(mode)
        return self

    def close(self) -> None:
        """Give the wrapped model its plain forward pass back and close all files."""
        self._hook.remove()
        self.serving.detach()
        self.store.close()

    def __call__(self, *args: Any, task_id: Any = None, weights: Any = None, **kwargs: Any) -> Any:
        """The wrapped model's forward pass, under given experts where they are given."""
        given = task_id if task_id is not None else weights
        if given is None:
            return self.model(*args, **kwargs)
        with self.using(given):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)  # not initialised yet
        return getattr(self.model, name)

    # ---- deciding

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide at prefill; later steps of a generation keep to it."""
        if self._looking:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows = ids if ids is not None else kwargs.get("inputs_embeds")
        if rows is None:
            raise InputError("a mediated model's forward pass needs input_ids or inputs_embeds")
        if self._pinned is not None:
            self._use(self._pinned, len(rows))
        elif _is_prefill(kwargs):
            if ids is None:
                raise RuntimeError(f"prompts came as embeddings, which can't be routed: {_NOT_FITTED}")
            self._use(self._decide(ids, kwargs.get("attention_mask")), len(rows))
        elif self.serving.mix is not None:
            self.serving.use(self.serving.mix.repeated(len(rows)))

    def _use(self, decisions: list[RoutingDecision], batch: int) -> None:
        mix = Mix.of([decision.weights for decision in decisions]).repeated(batch)
        self.decisions = decisions
        if self.serving.mix != mix:
            self.serving.use(mix)

    @contextmanager
    def _pin(self, decisions: list[RoutingDecision]) -> Iterator[None]:
        before, self._pinned = self._pinned, decisions
        try:
            yield
        finally:
            self._pinned = before

    def _decide(self, ids: Tensor, mask: Tensor | None) -> list[RoutingDecision]:
        if self.router is None:
            raise RuntimeError(_NOT_FITTED)
        features = self._features(ids, mask, self.router.config)
        decisions = [self._in_order(decision) for decision in self.router.decide(features)]
        for decision in decisions:
            self.counts[decision.task, decision.branch] += 1
            log.debug("%s", decision)
        return decisions

    def _in_order(self, decision: RoutingDecision) -> RoutingDecision:
        """A decision of the router with its weights in the order of the store's tasks."""
        assert self.router is not None
        if self.router.tasks == self.tasks:
            return decision
        weights = dict(zip(self.router.tasks, decision.weights, strict=True))
        ordered = tuple(weights.get(task, 0.0) for task in self.tasks)
        return RoutingDecision(decision.task, ordered, decision.uncertainty, decision.ood, decision.branch)

    def _given(self, given: Given | Sequence[Given], batch: int) -> list[RoutingDecision]:
        listed: Sequence[Given] = [given] if isinstance(given, str | Mapping) else given
        decisions = []
        for entry in listed:
            weights = self.store.weights_of(entry)
            row = tuple(weights.get(task, 0.0) for task in self.tasks)
            task = max(weights, key=lambda name: weights[name])
            decisions.append(RoutingDecision(task, row, 0.0, False, "given"))
            self.counts[task, "given"] += 1
        if len(decisions) not in (1, batch) and batch > 1:
            raise InputError(
                f"task_id: {len(decisions)} tasks for {batch} sequences; expected one, or one each"
            )
        return decisions

    # ---- features

    def _features_of(self, prompts: Sequence[Sequence[int]], config: RouterConfig, size: int) -> np.ndarray:
        found = [
            self._features(*self._padded(prompts[at : at + size]), config)
            for at in range(0, len(prompts), size)
        ]
        return np.concatenate(found)

    def _features(self, ids: Tensor, mask: Tensor | None, config: RouterConfig) -> np.ndarray:
        """What the router sees of each prompt: (B, L) -> (B, F); NaN for a prompt without tokens."""
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        if config.feature == "text":
            return self._text_features(ids, mask, config.text_features)
        device = self.model.get_input_embeddings().weight.device
        ids, mask = ids.to(device), mask.to(device)
        blocks = self._blocks()
        layer = config.layer if config.layer is not None else -(-len(blocks) // 2)
        if layer > len(blocks):
            raise InputError(f"router: layer {layer}, the model has {len(blocks)} blocks")
        with torch.inference_mode():
            if config.feature == "embedding" or layer == 0:
                hidden = self.model.get_input_embeddings()(ids)
            else:
                hidden = self._hidden(blocks[layer - 1], ids, mask)
            hidden = hidden.to(torch.float64)
            if config.feature == "last_token":
                last = (mask * torch.arange(1, mask.shape[1] + 1, device=device)).argmax(dim=1)
                found = hidden[torch.arange(len(ids), device=device), last]
                found[mask.sum(dim=1) == 0] = torch.nan
            else:
                share = mask.to(torch.float64)[..., None]
                found = (hidden * share).sum(dim=1) / share.sum(dim=1)
        return found.cpu().numpy()

    def _hidden(self, block: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The output of a block of the dense model; nothing after the block is computed."""
        reached: list[Tensor] = []

        def stop(module: Any, args: Any, output: Any) -> None:
            reached.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        extra = {}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            extra["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        before, self._looking = self.serving.mix, True
        self.serving.use(None)
        handle = block.register_forward_hook(stop)
        try:
            self.model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        except _Reached:
            pass
        finally:
            handle.remove()
            self._looking = False
            self.serving.use(before)
        return reached[0]

    def _blocks(self) -> Any:
        """The model's list of blocks."""
        name = self.store.plan.blocks[0].block.rpartition(".")[0]
        prefix = f"{self.model.base_model_prefix}."
        for path in (name, prefix + name, name.removeprefix(prefix)):
            try:
                return self.model.get_submodule(path)
            except AttributeError:
                continue
        raise CheckpointError(f"{self.store.checkpoint.name}: the model has no blocks `{name}`")

    def _text_features(self, ids: Tensor, mask: Tensor, buckets: int) -> np.ndarray:
        """Hashed character n-grams, each text's of length 1."""
        tokenizer = self._needed_tokenizer()
        found = np.zeros((len(ids), buckets))
        for row, (prompt, kept) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            tokens = [token for token, used in zip(prompt, kept, strict=True) if used]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            for size in _NGRAMS:
                for at in range(len(text) - size + 1):
                    found[row, zlib.crc32(text[at : at + size].encode()) % buckets] += 1
            found[row] /= np.linalg.norm(found[row]) if text else np.nan
        return found

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self._needed_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("prompts are text and the folder has no tokenizer; give one to fit_router")
        return self.tokenizer

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of prompts, padded on the right."""
        width = max(1, max(len(prompt) for prompt in prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
            mask[row, : len(prompt)] = 1
        return ids, mask

    def _refresh(self, changed: tuple[str, ...]) -> None:
        """Take over averaged tensors that experts coming or going changed."""
        if not changed:
            return
        targets = find_targets(self.model, self.store, changed, check=False)
        for target in targets:
            flat = target.parameter.data.reshape(-1)
            for tensor, places in target.pieces.items():
                values = torch.from_numpy(self.store.read(tensor)).to(flat.device, flat.dtype)
                if places is None:
                    flat.copy_(values)
                else:
                    flat[places.to(flat.device)] = values


_NOT_FITTED = "the router is not fitted: call fit_router(prompts), or say which expert answers with task_id"


def _is_prefill(kwargs: Mapping[str, Any]) -> bool:
    past = kwargs.get("past_key_values")
    return past is None or (hasattr(past, "get_seq_length") and past.get_seq_length() == 0)
