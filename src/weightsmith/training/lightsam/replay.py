"""What makes the second pass the same function as the first: random numbers and running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RandomState = dict[torch.device, Tensor]
"""State of the generator of each device."""


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """State of the random generators of the CPU and of `devices`."""
    state = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: RandomState) -> None:
    """Put generators back into a state."""
    for device, values in state.items():
        if device.type == "cpu":
            torch.set_rng_state(values)
        else:
            torch.get_device_module(device).set_rng_state(values, device)


@contextmanager
def running_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Normalise by batch as usual, and leave the running means and variances as they were before.

    Copies and puts back: a momentum of 0 would be wrong for layers that average over all batches
    (`momentum=None`).
    """
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
            kept += [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
