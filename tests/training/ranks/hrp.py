"""HRP in one process and on several that each see a part of every batch. See `run_ranks`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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


def main(folder):
    alone = directions(slice(None))
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    results = {
        "alone": alone,
        "parts": directions(slice(4 * rank, 4 * rank + 4)),
        "sharded": directions(slice(4 * rank, 4 * rank + 4), shard=True),
        "same": directions(slice(None), gather=False),
        # A branch that one process takes and the other doesn't: both must exchange the same numbers.
        "branches": directions(slice(None), branch=rank == 1),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
