"""TeZO, MeZO and LOZO in one process and on several that each see a part of every batch. See `run_ranks`."""

import torch
import torch.distributed as dist
from meeting import meet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weightsmith.errors import InputError
from weightsmith.training import LOZO, MeZOAdam, TeZO, TeZOAdam, TeZOMomentum

STEPS = 12
MAKERS = {
    "TeZO": lambda params, **more: TeZO(params, 0.02, rank=3, **more),
    "TeZO-m": lambda params, **more: TeZOMomentum(params, 0.02, rank=3, **more),
    "TeZO-Adam": lambda params, **more: TeZOAdam(params, 0.02, rank=3, **more),
    "MeZO-Adam": lambda params, **more: MeZOAdam(params, 0.02, **more),
    "LOZO": lambda params, **more: LOZO(params, 0.02, rank=2, interval=5, **more),
}

ODD = {
    "seed": lambda params, rank: TeZO(params, 0.02, seed=rank),
    "rank": lambda params, rank: TeZO(params, 0.02, rank=1 + rank),
    "rank of one matrix": lambda params, rank: TeZO(params, 0.02, rank={"body*": 1 + rank, "*": 1}),
    "variant": lambda params, rank: TeZO(params, 0.02, variant=("sgd", "momentum")[rank]),
    "rho": lambda params, rank: TeZO(params, 0.02, rho=(1e-3, 1e-2)[rank]),
    "lr": lambda params, rank: TeZO(params, (0.02, 0.01)[rank]),
    "method": lambda params, rank: (TeZO, MeZOAdam)[rank](params, 0.02, variant="adam"),
}
"""Pairs of processes that would go apart; the head has one row, so its rank is one in all."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


class Counted:
    """Every call that sends something, and how many numbers."""

    def __init__(self):
        self.sent = []
        for name in ("all_gather", "all_reduce", "broadcast"):
            setattr(dist, name, self.wrap(name, getattr(dist, name)))

    def wrap(self, name, function):
        def call(*args, **kwargs):
            tensor = args[1] if name == "all_gather" else args[0]
            self.sent.append((name, tensor.numel()))
            return function(*args, **kwargs)

        return call


def train(model, optimizer, rank, world, split=(5, 4)):
    for step in range(STEPS):
        rows = batch(step)
        if world > 1:  # unequal parts, weighed by their rows
            rows = rows.split(split)[rank]
        optimizer.step(lambda rows=rows: loss(model, rows), weight=len(rows))
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def measure(rank, world, folder):
    results, counted = {}, Counted()
    for name, make in MAKERS.items():
        model = Net()
        results[f"alone {name}"] = train(model, make(model.named_parameters(), process_group=None), 0, 1)
        wrapped = DistributedDataParallel(Net())
        optimizer = make(wrapped.named_parameters())
        counted.sent.clear()
        results[f"ddp {name}"] = train(wrapped, optimizer, rank, world)
        results[f"sent {name}"] = list(counted.sent)
    results["odd"], results["untouched"] = {}, 0.0
    for name, make in ODD.items():
        model = Net()
        before = model.body.weight.detach().clone()
        try:
            make(model.named_parameters(), rank).step(lambda model=model: loss(model, batch(0)))
        except InputError as wrong:
            results["odd"][name] = str(wrong)
        moved = float((model.body.weight - before).detach().abs().max())
        results["untouched"] = max(results["untouched"], moved)
    return results


if __name__ == "__main__":
    meet(measure)
