"""Parameter groups: whether an optimiser fits AlphaDecay, and one group a matrix."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightsmith.errors import InputError
from weightsmith.training.alphadecay.matrices import Matrix
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.lightsam.two_pass import TwoPassOptimizer

log = logging.getLogger(__name__)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimiser inside accelerate's wrapper, whose own step hooks never run."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = cast(Any, optimizer).optimizer
    return optimizer


def decouples(optimizer: Optimizer) -> bool:
    """Whether it multiplies weights by 1 - lr * decay, as AdamW does, and from where they are: a two-pass
    optimiser begins its step at others.
    """
    if isinstance(optimizer, TwoPassOptimizer):
        return False
    return isinstance(optimizer, torch.optim.AdamW) or all(
        group.get("decoupled_weight_decay") for group in optimizer.param_groups
    )


def decays_in_place(optimizer: Optimizer, matrices: Sequence[Matrix]) -> bool:
    """Whether the optimiser's own pass can decay each matrix by its own value at no cost.

    On a CPU torch's kernels go through tensors one by one, so a group for each costs a call. An accelerator
    takes all of a group in one launch, and other optimisers may keep something by group.
    """
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return (
        plain and decouples(optimizer) and all(matrix.parameter.device.type == "cpu" for matrix in matrices)
    )


def members_by_decay(
    groups: Sequence[dict[str, Any]], decay_of: Callable[[Tensor, float], float]
) -> list[tuple[int, dict[str, Any]]]:
    """Each group split by the decay of its members: the group's place, and what a part has of its own.

    Args:
        groups: Left as they are.
        decay_of: Decay of a parameter, from that of its group.
    """
    split = []
    for place, group in enumerate(groups):
        members: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            members.setdefault(float(decay_of(parameter, group["weight_decay"])), []).append(parameter)
        split += [(place, {"params": those, "weight_decay": decay}) for decay, those in members.items()]
    return split


def update_fused(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do the update of fused AdamW for groups of one matrix, straight by torch's kernel.

    Of an AdamW of many groups a twentieth of the time on a CPU is the Python around the kernel, 50
    microseconds a group. A matrix that the optimiser would look at more closely stays with it: without state
    or gradient, or with a gradient that a scaler still has to unscale.

    Args:
        groups: Those of the coming step.

    Returns:
        The groups that are left to the optimiser.
    """
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return list(groups)
    left, taken = [], []
    for group in groups:
        parameter = group["params"][0]
        state = optimizer.state.get(parameter)
        plain = group["fused"] and not group["amsgrad"] and not group["differentiable"]
        if plain and len(group["params"]) == 1 and state and _is_dense(parameter.grad):
            taken.append((group, parameter, state))
        else:
            left.append(group)
    if taken:
        torch._foreach_add_([state["step"] for _, _, state in taken], 1)
    for group, parameter, state in taken:
        torch._fused_adamw_(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )
    return left


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout == torch.strided


def check_groups(optimizer: Optimizer, matrices: Sequence[Matrix], options: AlphaDecayOptions) -> None:
    """Refuse an optimiser that can't be steered.

    Raises:
        InputError: it has no step hooks, misses a matrix, or has no usable `weight_decay`.
    """
    if options.mode == "decoupled" and isinstance(optimizer, TwoPassOptimizer):
        raise InputError(
            f"{type(optimizer).__name__} begins its step at other weights, so the decay of mode `decoupled` "
            "would be lost; take mode `groups`"
        )
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise InputError(f"{type(optimizer).__name__} has no step hooks; give a torch.optim.Optimizer")
    homes = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for matrix in matrices:
        group = homes.get(id(matrix.parameter))
        if group is None:
            raise InputError(f"{matrix.name} is not among the optimiser's parameters; `exclude` it")
        decay = group.get("weight_decay")
        if decay is None or not decay >= 0:
            raise InputError(
                f"the optimiser's group of {matrix.name} has weight_decay {decay}: set "
                "`weight_decay` on the optimiser"
            )
    used = {homes[id(matrix.parameter)]["weight_decay"] for matrix in matrices}
    if options.base_weight_decay is None and len(used) > 1:
        if options.decay_rest == "base":
            raise InputError(f"decay_rest `base` needs base_weight_decay: the groups have {sorted(used)}")
        log.info("matrices have several base decays (%s); each is scaled on its own", sorted(used))


def has_scheduler(*optimizers: Optimizer) -> bool:
    """Whether a learning rate scheduler was built on one of these (an optimiser and what wraps it)."""
    return any(hasattr(optimizer.step, "_wrapped_by_lr_sched") for optimizer in optimizers)


def one_group_each(optimizer: Optimizer, ours: set[int], *, scheduled: bool) -> None:
    """Give each parameter of `ours` a group of its own that copies every option of its old one.

    Args:
        optimizer: Its `param_groups` are replaced; its state is kept by parameter and stays.
        ours: ids of parameters.
        scheduled: Whether a learning rate scheduler was built on the groups.

    Raises:
        InputError: a learning rate scheduler already holds one entry a group.
    """
    crowded = any(
        len(group["params"]) > 1 and any(id(parameter) in ours for parameter in group["params"])
        for group in optimizer.param_groups
    )
    if crowded and scheduled:
        raise InputError(
            "mode `groups` adds parameter groups, and a learning rate scheduler has been built on the old "
            "ones: make AlphaDecay before the scheduler, or use mode `decoupled`"
        )
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        members = list(zip(group["params"], names, strict=True))
        apart = [member for member in members if id(member[0]) in ours and len(members) > 1]
        rest = [member for member in members if not any(member is other for other in apart)]
        rest_groups = [rest] if rest else []
        for part in [*([member] for member in apart), *rest_groups]:
            fresh = {
                key: copy.copy(value) for key, value in group.items() if key not in ("params", "param_names")
            }
            fresh["params"] = [parameter for parameter, _ in part]
            if "param_names" in group:
                fresh["param_names"] = [name for _, name in part]
            groups.append(fresh)
    optimizer.param_groups[:] = groups
