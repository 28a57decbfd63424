"""HRP in one process and on several that each see a part of every batch. See `run_ranks`."""

import os
from functools import partial

import torch
from meeting import meet
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weightsmith.errors import InputError
from weightsmith.training import initialize_lora_hrp_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(12, 9, dtype=torch.float64)
        self.unused = nn.Linear(12, 9, dtype=torch.float64)
        self.head = nn.Linear(9, 5, dtype=torch.float64)

    def forward(self, x, branch):
        hidden = self.unused(x) if branch else self.body(x)
        return self.head(torch.tanh(hidden))


def batch(step):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def directions(rows, branch=False, shard=False, **more):
    model = get_peft_model(
        Net(), LoraConfig(r=2, target_modules=["body", "unused", "head"]), autocast_adapter_dtype=False
    )
    if shard:
        fully_shard(model.base_model.model.body)
        fully_shard(model)
    torch.manual_seed(os.getpid())  # what processes draw by themselves doesn't matter
    report = initialize_lora_hrp_weights(
        model,
        train_step=lambda model, step: (model(batch(step)[rows], branch) - 1).square().mean(),
        preheat_steps=6,
        preheat_lr=0.01,
        show_progress_bar=False,
        **more,
    )
    found = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    if shard:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found = {name: p.full_tensor() for name, p in found.items()}
    return {**found, "losses": torch.tensor(report.losses, dtype=torch.float64)}


def refusal(**more):
    """What is said of a sharded model."""
    try:
        directions(slice(None), shard=True, **more)
    except InputError as refused:
        return str(refused)


def measure(alone, rank, world, folder):
    return {
        "alone": alone,
        "parts": directions(slice(4 * rank, 4 * rank + 4)),
        "sharded": directions(slice(4 * rank, 4 * rank + 4), shard=True),
        "shared ranks": refusal(rank_energy=2.0),
        "same": directions(slice(None), gather=False),
        # A branch that one process takes and the other doesn't: both must exchange the same numbers.
        "branches": directions(slice(None), branch=rank == 1),
    }


if __name__ == "__main__":
    meet(partial(measure, directions(slice(None))))
