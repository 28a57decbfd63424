"""AdaGC in the Hugging Face Trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from weightsmith.errors import InputError
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.adagc.options import AdaGCOptions

logger = logging.getLogger(__name__)


class AdaGCCallback(TrainerCallback, ExportableState):
    """Clips with AdaGC between the backward pass and the optimiser step of a Trainer.

    It switches the Trainer's own clipping off for the run (one warning), keeps its state in
    `trainer_state.json`, and adds `adagc/clip_rate`, `adagc/min_coef` and `adagc/global_norm` to the logs.
    The Trainer computes a global norm for its log in any case; where one gradient is not finite, that pass
    has spread it over all gradients before any callback runs, so the whole step's gradient becomes zero.

    Args:
        **options: As `AdaGCOptions`. Short fine-tunes want `init="ema"`.

    Raises:
        InputError: an unknown option; at the start of training: DeepSpeed, which keeps gradients to itself.

    Example:
        >>> callback = AdaGCCallback(init="ema", lambda_rel=1.5)
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, **options: Any) -> None:
        self.options = AdaGCOptions.of(**options)
        self.clip: AdaGC | None = None
        self.saved: dict[str, Any] | None = None
        self._max_grad_norm = 0.0
        self._global_norm: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the clipper for the prepared model, restore its state, switch the Trainer's clipping off."""
        if getattr(args, "deepspeed", None):
            raise InputError(
                "AdaGCCallback: DeepSpeed keeps gradients outside `.grad`; set `gradient_clipping` in its "
                "own configuration, or train with FSDP2"
            )
        model: nn.Module = kwargs["model"]
        self._max_grad_norm = args.max_grad_norm
        if args.max_grad_norm and args.max_grad_norm > 0:
            logger.warning(
                "AdaGCCallback: max_grad_norm=%g is switched off for this run; AdaGC clips globally to "
                "lambda_abs=%g in its warm-up and by tensor afterwards",
                args.max_grad_norm,
                self.options.lambda_abs,
            )
        args.max_grad_norm = 0.0
        self.clip = AdaGC(model, self.options, total_steps=state.max_steps if state.max_steps > 0 else None)
        saved = self.saved or _stored(state, type(self).__name__)
        if saved is not None and state.global_step > 0:
            self.clip.load_state_dict(saved)
        elif state.global_step > 0:
            logger.warning("AdaGCCallback: the checkpoint has no AdaGC state; its warm-up starts now")
        self.saved = None
        if isinstance(state.stateful_callbacks, dict):
            # The Trainer can't save a callback that the checkpoint it resumed from didn't know.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip."""
        assert self.clip is not None
        self._global_norm = self.clip.step(found_inf=_overflow(kwargs.get("optimizer"))).global_norm

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add what was clipped since the last log line."""
        if self.clip is None or self._global_norm is None or logs is None or "loss" not in logs:
            return
        summary = self.clip.summary()
        more = {f"adagc/{key}": summary[key] for key in ("clip_rate", "min_coef", "nonfinite")}
        more["adagc/global_norm"] = float(self._global_norm)
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the arguments their clipping back."""
        args.max_grad_norm = self._max_grad_norm

    def state(self) -> dict[str, Any]:
        """Options and running means, for `trainer_state.json`."""
        saved = self.saved if self.clip is None else self.clip.state_dict()
        return {"args": dataclasses.asdict(self.options), "attributes": {"saved": saved}}


def _stored(state: TrainerState, name: str) -> dict[str, Any] | None:
    """The state in a loaded `trainer_state.json`: the Trainer itself restores callbacks only on request."""
    stored = state.stateful_callbacks
    entry = stored.get(name) if isinstance(stored, Mapping) else None
    entry = entry[0] if isinstance(entry, list) and entry else entry
    return entry["attributes"].get("saved") if isinstance(entry, Mapping) else None


def _overflow(optimizer: Any) -> Any:
    """What the loss scaler found in this step's gradients, 0-d, or None without a scaler."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    inner = optimizer.optimizer
    found = scaler._per_optimizer_states[id(inner)]["found_inf_per_device"]
    return sum(found.values()) if found else None
