"""Averaging on two ranks: replicated, sharded by FSDP2, and in one process. See `run_ranks`."""

import torch
import torch.distributed as dist
from meeting import meet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from weightsmith.training import FolderBank, MemoryBank, RunningAverage, SeWAOptions, sewa_select
from weightsmith.training.averaging.saving import write_candidate

STEPS = 20


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def batches(rank, world, number=4):
    generator = torch.Generator().manual_seed(5)
    every = []
    for _ in range(number):
        x = torch.randn(8, 5, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        every.append({"x": x[rank::world], "y": y[rank::world]})
    return every


def plain(model):
    named = ((name, p.detach()) for name, p in model.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in named}


def run(model, out, kind, rank, world):
    """Twenty steps of noise, a ring of candidates, a choice, a mean in memory and from folders, an EMA."""
    bank, ema, paths = MemoryBank(8), RunningAverage(model, kind="ema", decay=0.8), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = (0.3) * torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
                parameter.add_(noise)
        ema.update()
        if step >= STEPS - 10:
            bank.add(model, step)
        if step >= STEPS - 4:
            paths.append(out / f"{kind}-{step}")
            write_candidate(model, paths[-1], step)
    dist.barrier()
    chosen = sewa_select(
        model,
        bank,
        batches(rank, world),
        loss,
        num_select=3,
        options=SeWAOptions(steps=30),
        held_out_batches=2,
    )
    results = {
        "steps": list(chosen.chosen_steps),
        "scores": list(chosen.scores),
        "history": list(chosen.history),
    }
    bank.mix(chosen.weights, model)
    results["mean"] = plain(model)
    folders = FolderBank(paths)
    folders.mix([0.1, 0.2, 0.3, 0.4], model)
    results["folders"] = plain(model)
    from_files = sewa_select(
        model, folders, batches(rank, world), loss, num_select=2, options=SeWAOptions(steps=5)
    )
    results["scores from files"] = list(from_files.scores)
    ema.load_into_model()
    results["ema"] = plain(model)
    return results


def measure(rank, world, folder):
    results = {"ddp": run(net(), folder, "ddp", rank, world)}
    sharded = net()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    results["fsdp"] = run(sharded, folder, "fsdp", rank, world)
    # Every rank alone with whole batches: what one process computes.
    results["whole"] = run(net(), folder, "whole", 0, 1)
    return results


if __name__ == "__main__":
    meet(measure)
