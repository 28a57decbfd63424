"""Two-pass steps in the Hugging Face Trainer.

The Trainer runs forward and backward for each micro-batch and then calls the optimiser once. A callback can't
add a second forward pass, so this is a mixin around `training_step`: micro-batches are remembered with their
random states, and on the one that completes the batch the optimiser goes to the perturbed point, the
remembered ones run again there, and the weights are restored. The Trainer's own clipping, callbacks and
`optimizer.step()` then act on the second gradients.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from weightsmith.errors import InputError
from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.replay import (
    RandomState,
    random_state,
    running_statistics_kept,
    set_random_state,
)
from weightsmith.training.lightsam.two_pass import TwoPassOptimizer
from weightsmith.training.tezo.trainer import ZOTrainerMixin

logger = logging.getLogger(__name__)


class SAMTrainerMixin(ZOTrainerMixin):
    """Runs both passes of `LightSAM`, `SAM` and `ASAM`; leaves other optimisers to the mixin above it, and so
    to the Trainer.

    Put it before the Trainer: `class MyTrainer(SAMTrainerMixin, SFTTrainer)`. Gradient accumulation, DDP,
    FSDP2, and fp16 loss scaling work. Logged losses are those at the weights, logged gradient norms those at
    the perturbed point.
    """

    _queue: list[tuple[dict[str, Any], RandomState]]
    _rise: Tensor | float = 0.0
    _rises: int = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer, with `sam/sharpness`: the loss at the perturbed point less that at the weights,
        mean over the steps since the last line (this process's batches).
        """
        if "loss" in logs and self._rises:
            logs["sam/sharpness"] = float(self._rise) / self._rises
            self._rise, self._rises = 0.0, 0
        super().log(logs, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward; on the micro-batch that completes a batch, both again at the perturbed point.

        Raises:
            InputError: DeepSpeed, which keeps gradients and weights to itself.
        """
        optimizer = two_pass_optimizer(self.optimizer)
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.is_deepspeed_enabled:
            raise InputError(
                "SAMTrainerMixin: DeepSpeed keeps gradients and weights to itself; train with FSDP2"
            )
        if not hasattr(self, "_queue"):
            self._queue = []
            self._rise, self._rises = 0.0, 0
            self._advise(optimizer)
        devices = [self.args.device]
        self._queue.append((dict(inputs), random_state(devices)))
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._queue.clear()
            self._rise, self._rises = 0.0, 0
            raise
        self._rise = self._rise - loss
        if self.accelerator.sync_gradients:
            after = random_state(devices)
            queue, self._queue = self._queue, []
            scaler = getattr(self.accelerator, "scaler", None)
            scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
            with optimizer.perturbed(grad_scale=scale), running_statistics_kept(model):
                for index, (again, state) in enumerate(queue):
                    if optimizer.replay_rng:
                        set_random_state(state)
                    with self._sync_on(model, last=index == len(queue) - 1):
                        self._rise = self._rise + super().training_step(model, again, num_items_in_batch)
            self._rises += 1
            if optimizer.replay_rng:
                set_random_state(after)
        return loss

    def _sync_on(self, model: nn.Module, *, last: bool) -> Any:
        """As the Trainer's loop: gradients are reduced on the last micro-batch only."""
        if last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        if getattr(self, "is_distributed_loading_by_transformers", False) and isinstance(
            self.model, FSDPModule
        ):
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model=model)

    def _advise(self, optimizer: TwoPassOptimizer) -> None:
        clipped = self.args.max_grad_norm and self.args.max_grad_norm > 0
        if clipped and isinstance(optimizer, LightSAM) and optimizer.variant != "adam":
            logger.warning(
                "SAMTrainerMixin: max_grad_norm=%g clips the second gradient, so the running sums of "
                "%s see clipped norms; max_grad_norm=0 leaves them to the method",
                self.args.max_grad_norm,
                optimizer.variant,
            )


class SAMTrainer(SAMTrainerMixin, Trainer):
    """A Trainer whose optimiser may be `LightSAM`, `SAM` or `ASAM`.

    Example:
        >>> # SAMTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(LightSAM, {"lr": 1e-4}))
    """


def two_pass_optimizer(optimizer: Any) -> TwoPassOptimizer | None:
    """The two-pass optimiser inside accelerate's wrapper, if there is one."""
    while not isinstance(optimizer, TwoPassOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return optimizer
