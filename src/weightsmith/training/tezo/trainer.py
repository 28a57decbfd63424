"""Zeroth-order steps in the Hugging Face Trainer.

The Trainer runs forward and backward for each micro-batch and then calls the optimiser once. Here nothing
runs backward: micro-batches are remembered until the batch is complete, then both probes run over all of
them, so that however many there are the weights move as often as with one. The Trainer's own callbacks,
schedule and `optimizer.step()` follow.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from weightsmith.errors import InputError
from weightsmith.training.tezo.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object


class ZOTrainerMixin(_Base):
    """Runs the probes of `TeZO`, `MeZO` and `LOZO`; with any other optimiser a Trainer stays as it is.

    Put it before the Trainer: `class MyTrainer(ZOTrainerMixin, SFTTrainer)`. Gradient accumulation, DDP, PEFT
    models and losses without derivative work. Probes run in `eval()` mode, without autograd. There are no
    gradients, so none is clipped or logged.
    """

    _waiting: list[dict[str, Any]] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; directions are keyed by the model's names for its parameters. Each training asks
        for it first, so what one before it left half done ends here.
        """
        made = super().create_optimizer(*args, **kwargs)
        optimizer = zeroth_order_optimizer(self.optimizer)
        if optimizer is not None:
            optimizer.attach(_bare(self.model))
            optimizer.forget_probes()
            self._waiting = None
        return made

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Remember a micro-batch; on the one that completes a batch, probe with all of them.

        Returns:
            The loss of the whole batch there, 0 before.

        Raises:
            InputError: DeepSpeed, which keeps weights to itself; FSDP by the Trainer.
        """
        optimizer = zeroth_order_optimizer(self.optimizer)
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._waiting is None:
            self._waiting = []
            self._prepare_for_probes()
        self._waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        waiting, self._waiting = self._waiting, []
        losses: list[float] = []

        def closure() -> float:
            parts = [self._part_of_loss(_bare(model), part, num_items_in_batch) for part in waiting]
            losses.append(float(torch.stack(parts).double().sum()))
            return losses[-1]

        with _evaluating(model):
            optimizer.probe(closure)
        return torch.tensor(sum(losses) / len(losses), device=self.args.device)

    def _part_of_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """What a micro-batch adds to the loss of its batch, as the Trainer counts it."""
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = torch.as_tensor(loss, device=self.args.device).detach()
        if self.args.n_gpu > 1:
            loss = loss.mean()
        if loss.numel() != 1:
            raise InputError(f"ZOTrainerMixin: the loss must be one number, got shape {tuple(loss.shape)}")
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return loss.reshape(()) if scaled else loss.reshape(()) / self.current_gradient_accumulation_steps

    def _prepare_for_probes(self) -> None:
        if self.is_deepspeed_enabled:
            raise InputError("ZOTrainerMixin: DeepSpeed keeps weights to itself; replicate the model (DDP)")
        if self.is_fsdp_enabled:
            raise InputError(
                "ZOTrainerMixin: the Trainer's FSDP exchanges parameters behind the optimiser; replicate the "
                "model (DDP), or shard it with fully_shard in a loop of your own, where TeZO knows it"
            )
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            logger.warning(
                "ZOTrainerMixin: max_grad_norm=%g is ignored: there are no gradients; the optimiser's `clip` "
                "bounds the derivative of a step",
                self.args.max_grad_norm,
            )
        if getattr(self.optimizer, "scaler", None) is not None:
            # It would wait for gradients to unscale.
            self.optimizer.scaler = None  # pyrefly: ignore[missing-attribute]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if zeroth_order_optimizer(self.optimizer) is None:
            return super()._clip_grad_norm(model)
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if zeroth_order_optimizer(self.optimizer) is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return None


class ZOTrainer(ZOTrainerMixin, Trainer):
    """A Trainer whose optimiser may be `TeZO`, `MeZO` or `LOZO`.

    Example:
        >>> # ZOTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(TeZO, {"lr": 1e-5}))
    """


def zeroth_order_optimizer(optimizer: Any) -> ZerothOrder | None:
    """The zeroth-order optimiser inside accelerate's wrapper, if there is one."""
    while not isinstance(optimizer, ZerothOrder):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return optimizer


def _bare(model: Any) -> nn.Module:
    """The model without DDP around it, which would only watch for gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in `eval()` mode, and those that weren't back in training mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
