"""Twenty steps with AlphaDecay: replicated (DDP), sharded (FSDP2), and in one process. See `run_ranks`."""

import torch
import torch.distributed as dist
from meeting import meet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from weightsmith.errors import InputError
from weightsmith.training import AlphaDecay

WIDTH, HIDDEN, STEPS = 12, 21, 20  # 21 rows don't divide between two ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.q_proj(x))))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, WIDTH), Block(), Block(), nn.Linear(WIDTH, 16))


def train(model, rank, world, mode, foreach):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, foreach=foreach)
    decay = AlphaDecay(model, optimizer, min_dim=8, interval=6, mode=mode, exclude=("3.weight",))
    for step in range(STEPS):
        ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
        mine = ids[rank::world]
        loss = nn.functional.cross_entropy(model(mine).flatten(0, 1), mine.flatten().roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"weights": weights, "decays": decay.weight_decays(), "alphas": decay.history}


def alone(group, mode):
    """One process that does what two ranks do: the mean of the gradients of their halves of each batch."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, foreach=False)
    options = {"min_dim": 8, "interval": 6, "mode": mode, "exclude": ("3.weight",)}
    decay = AlphaDecay(model, optimizer, group=group, **options)
    for step in range(STEPS):
        ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for mine in (ids[0::2], ids[1::2]):
            loss = nn.functional.cross_entropy(model(mine).flatten(0, 1), mine.flatten().roll(1))
            (loss / 2).backward()
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "decays": decay.weight_decays(), "alphas": decay.history}


def broken(rank):
    """Whether every rank hears of a matrix that only its owner has looked at."""
    model = net()
    with torch.no_grad():
        model[1].q_proj.weight[0, 0] = float("nan")
    decay = AlphaDecay(model, torch.optim.AdamW(model.parameters()), min_dim=8)
    try:
        decay.refresh()
    except InputError as problem:
        return str(problem)
    return ""


def different(rank):
    """What ranks with different models are told."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(1 + rank)])
    decay = AlphaDecay(model, torch.optim.AdamW(model.parameters()), min_dim=8)
    try:
        decay.refresh()
    except InputError as problem:
        return str(problem)
    return ""


def measure(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for mode in ("decoupled", "groups"):
        results[f"ddp {mode}"] = train(DistributedDataParallel(net()), rank, world, mode, False)
        sharded = net()
        for block in (sharded[1], sharded[2], sharded):
            fully_shard(block, mesh=mesh)
        results[f"fsdp {mode}"] = train(sharded, rank, world, mode, True)
        single = dist.new_group([0])
        if rank == 0:
            results[f"alone {mode}"] = alone(single, mode)
    results["broken"] = broken(rank)
    results["different"] = different(rank)
    return results


if __name__ == "__main__":
    meet(measure)
