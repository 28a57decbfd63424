"""What TeZO has learnt as a LoRA adapter, without any approximation.

The factors never change, so all steps of the variants `sgd` and `momentum` add up to U diag(c) V^T: an
adapter with B = U diag(c) and A = V^T that PEFT and servers load. `adam` divides weight by weight and `lion`
takes signs, which leaves that span.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from weightsmith.errors import CheckpointError, InputError, require
from weightsmith.runs.atomic import system_faults
from weightsmith.training.tezo.low_rank import CPPiece
from weightsmith.training.tezo.optimizer import TeZO
from weightsmith.training.tezo.pieces import DensePiece, Piece


@torch.no_grad()
def changes(optimizer: TeZO) -> dict[str, tuple[Tensor, Tensor]]:
    """Left (M, R) and right (N, R) factor of what each matrix has changed by, by the parameter's name.

    Raises:
        InputError: the changes are no product of the factors: says why.
    """
    options = optimizer.options
    if not isinstance(optimizer, TeZO) or options.variant not in ("sgd", "momentum"):
        raise InputError(
            f"{type(optimizer).__name__} with variant `{options.variant}`: only the steps of TeZO's `sgd` "
            "and `momentum` add up to a product of low rank"
        )
    if options.refresh_interval:  # pyrefly: ignore[missing-attribute]
        raise InputError("refresh_interval: changes along factors that were replaced are in the weights only")
    if any(group["weight_decay"] for group in optimizer.param_groups):
        raise InputError("weight_decay: a model whose own weights shrink is no base and an adapter")
    pieces = optimizer.pieces()
    moving = {id(optimizer.parameter_of(piece)) for piece in pieces}
    for parameter, entry in optimizer.state.items():
        if "coefficients" in entry and id(parameter) not in moving:
            name = optimizer.name_of(parameter)
            raise InputError(f"{name}: was frozen after it was trained; unfreeze it to export what it learnt")
    return {piece.name: _change(optimizer, piece) for piece in pieces}


def _change(optimizer: TeZO, piece: Piece) -> tuple[Tensor, Tensor]:
    if isinstance(piece, DensePiece):
        raise InputError(
            f"{piece.name}: is trained and is no matrix; an adapter can't hold it (freeze_1d=True)"
        )
    assert isinstance(piece, CPPiece)
    if piece.share is not None:
        raise InputError(
            f"{piece.name}: is sharded, and an adapter needs all rows; load the optimiser's state into "
            "one of a whole model"
        )
    if len(piece.value) != 1:
        raise InputError(f"{piece.name}: stacked matrices have no LoRA layers")
    piece.turn(optimizer.step_count)
    numbers = piece.state.get("coefficients")
    numbers = torch.zeros(1, piece.rank) if numbers is None else numbers
    left, right = piece.u[0].to(piece.wide), piece.v[0].to(piece.wide)
    return left * (numbers[0] * piece.factor).to(left), right


def write_adapter(optimizer: TeZO, model: nn.Module, folder: str | Path, *, base: str | None = None) -> Path:
    """Write a PEFT LoRA adapter: the base model with it is the model as it is now.

    Args:
        optimizer: Has trained `model` with `sgd` or `momentum`.
        model: Its modules are named in the adapter.
        folder: Must not exist; appears when it is complete.
        base: Name or folder of the model that training began with, for the adapter's configuration.

    Raises:
        InputError: as `changes`; a matrix of another model, of a module that LoRA doesn't know, or of two.
        CheckpointError: `folder` exists.
        MissingExtraError: peft is not installed.
    """
    peft = require("peft", extra="hf", needed_by="a LoRA adapter")
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; nothing was written")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    parameters = {piece.name: optimizer.parameter_of(piece) for piece in optimizer.pieces()}
    for name, (left, right) in changes(optimizer).items():
        module, layer = _home(model, name, parameters[name])
        ranks[module] = left.shape[1]
        prefix = f"base_model.model.{module}.lora_"
        if isinstance(layer, nn.Embedding):
            tensors |= {f"{prefix}embedding_A": left.T, f"{prefix}embedding_B": right}
        elif type(layer).__name__ == "Conv1D":  # its weight is (in, out)
            tensors |= {f"{prefix}A.weight": left.T, f"{prefix}B.weight": right}
        else:
            tensors |= {f"{prefix}A.weight": right.T, f"{prefix}B.weight": left}
    most = max(ranks.values())
    # PEFT takes a pattern for the end of a name unless it is told where to begin.
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != most}
    config = peft.LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}")
    with system_faults(folder):
        try:
            hidden.mkdir(parents=True)
            config.save_pretrained(str(hidden))
            whole = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(whole, str(hidden / "adapter_model.safetensors"))
            os.rename(hidden, folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _home(model: nn.Module, name: str, parameter: Tensor) -> tuple[str, nn.Module]:
    """The module of a parameter, and its name."""
    homes = [
        (path, module)
        for path, module in model.named_modules()
        if any(own is parameter for own in module._parameters.values())
    ]
    if not homes:
        raise InputError(f"{name}: is no parameter of this model; give the one that was trained")
    if len(homes) > 1:
        raise InputError(
            f"{name}: is shared by {' and '.join(path for path, _ in homes)}; an adapter would change only "
            "one of them"
        )
    path, module = homes[0]
    if not (isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"):
        raise InputError(f"{name}: LoRA has no layer for {type(module).__name__}")
    return path, module
