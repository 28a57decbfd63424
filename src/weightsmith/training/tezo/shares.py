"""Parameters of which each process holds some rows, as under FSDP2.

A process moves its own rows: it draws the factor of all rows, as it would alone, and keeps its part of that.
So a sharded run takes the steps of an unsharded one, and sends no more than it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from weightsmith.errors import InputError
from weightsmith.training.tezo.options import TeZOOptions, ZerothOrderOptions


class Share(NamedTuple):
    """What this process holds of a parameter.

    Attributes:
        rows: Its part of the first axis.
        parameter: The whole, as far as there is one.
    """

    rows: slice
    parameter: DTensor

    def wrapped(self, mine: Tensor) -> DTensor:
        """Values for these rows as a tensor that is sharded like the parameter."""
        whole = self.parameter
        return DTensor.from_local(
            mine,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def share_of(parameter: Tensor, name: str, options: ZerothOrderOptions) -> Share | None:
    """This process's share; None where it holds the whole.

    Raises:
        InputError: a way of sharding, or an option, that needs more than the rows that are here.
    """
    if not isinstance(parameter, DTensor):
        return None
    if not isinstance(options, TeZOOptions):
        raise InputError(f"{name}: is sharded; MeZO and LOZO need whole parameters (DDP), TeZO doesn't")
    for key, value, instead in (
        ("restore", "branch", "inplace or snapshot"),
        ("rank", "auto", "a number, or patterns with a number each"),
        ("refresh_state", "project", "reset"),
    ):
        if getattr(options, key) == value:
            raise InputError(f"{name}: is sharded, and `{key}: {value}` needs it whole; take {instead}")
    split = [placement for placement in parameter.placements if not placement.is_replicate()]
    if any(type(placement) is not Shard or placement.dim != 0 for placement in split):
        found = ", ".join(map(str, parameter.placements))
        raise InputError(f"{name}: is placed as {found}; expected rows, Shard(0), or replicas")
    if not parameter.to_local().is_contiguous():
        raise InputError(f"{name}: its rows don't lie one after another in memory; make it contiguous")
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    start = min(offset[0], parameter.shape[0]) if shape else 0
    return Share(slice(start, start + (shape[0] if shape else 0)), parameter)


def whole_shape(value: Tensor, share: Share | None) -> torch.Size:
    """Shape of all rows of matrices (1, M, N), or of anything else with a first axis."""
    if share is None:
        return value.shape
    rows = share.parameter.shape[0]
    return torch.Size((1, rows, value.shape[-1])) if value.ndim == 3 else share.parameter.shape


def check_sharded(name: str, model: nn.Module | None, save_factors: bool) -> None:
    """Refuse an optimiser that can't have a sharded parameter.

    Args:
        name: The parameter's.
        model: The optimiser's, if it was given one.
        save_factors: The optimiser's option.

    Raises:
        InputError: no model, or factors are to be saved.
    """
    if model is None:
        raise InputError(
            f"{name}: is sharded; give it `model=model`, whose gathered copies of the weights are old after "
            "every move"
        )
    if save_factors:
        raise InputError(
            f"{name}: is sharded, and `save_factors` would save the rows of one process; leave it out: "
            "factors are drawn again"
        )


def drop_gathered(model: nn.Module | None) -> None:
    """Make FSDP2 gather anew: without a backward pass its root keeps the whole weights of the last forward
    pass, from before they moved. Nothing to do where there is no sharded model.
    """
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()
