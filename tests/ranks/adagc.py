"""AdaGC in one process, replicated (DDP), sharded (FSDP2, HSDP) and on DTensors placed by hand."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from meeting import meet
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from weightsmith.training.adagc.adamw import AdaGCAdamW
from weightsmith.training.adagc.clipper import AdaGC
from weightsmith.training.sharded import TensorNorms

STEPS = 20
CLIP = {"warmup_steps": 5, "init": "ema", "beta": 0.9, "lambda_rel": 1.2, "stacked": {"experts": 0}}


class Net(nn.Module):
    """A layer that divides unevenly, three stacked experts, and a head with fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5)
        self.experts = nn.Parameter(0.3 * torch.randn(3, 5, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(torch.einsum("bi,eio->bo", torch.tanh(self.body(x)), self.experts)))


def batch(step, rank=0, world=1):
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=noise) * (20.0 if step % 4 == 3 else 1.0)
    return x[rank::world]


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def sharded(**mesh):
    model = Net()
    fully_shard(model.body, **mesh)
    fully_shard(model, **mesh)
    return model


def optimizer_of(model, inside):
    if inside:
        optimizer = AdaGCAdamW(model.named_parameters(), lr=0.02, clip=CLIP)
        return optimizer, optimizer.clip
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    clip = AdaGC(optimizer, CLIP)
    clip.attach(optimizer)
    return optimizer, clip


def steps(model, optimizer, numbers, rank, world):
    for step in numbers:
        optimizer.zero_grad()
        loss(model, batch(step, rank, world)).backward()
        optimizer.step()


def train(model, rank, world, inside):
    optimizer, clip = optimizer_of(model, inside)
    coefficients, calls = [], []
    reduce = dist.all_reduce
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, batch(step, rank, world)).backward()
        count = []
        dist.all_reduce = lambda *a, count=count, **k: (count.append(1), reduce(*a, **k))
        clip.measure = lambda **k: (coefficients.append(out := AdaGC.measure(clip, **k)), out)[1]
        optimizer.step()
        dist.all_reduce = reduce
        calls.append(len(count))
    return {
        "weights": {name.removeprefix("module."): full(p) for name, p in model.named_parameters()},
        "coefficients": torch.stack([out.stats.coef for out in coefficients]),
        "norms": torch.stack([out.stats.pre_norm for out in coefficients]),
        "state": clip.state_dict(),
        "collectives": calls,
    }


def placed(rank):
    """Norms of tensors placed by hand, beside those of the whole tensors."""
    torch.manual_seed(1)
    whole = [torch.randn(5, 4), torch.randn(1, 3), torch.randn(7), torch.randn(3, 2, 4)]
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    cases = {
        "rows": [(line, [Shard(0)])] * 4,
        "columns": [(line, [Shard(1)])] * 2 + [(line, [Replicate()]), (line, [Shard(2)])],
        "hsdp": [(grid, [Replicate(), Shard(0)])] * 4,
        "both": [(grid, [Shard(0), Shard(1)])] * 2
        + [(grid, [Replicate(), Shard(0)]), (grid, [Shard(1), Shard(0)])],
        "two meshes": [
            (line, [Shard(0)]),
            (grid, [Shard(0), Shard(1)]),
            None,
            (grid, [Replicate(), Replicate()]),
        ],
    }
    out = {}
    for name, places in cases.items():
        params = [
            nn.Parameter(w.clone() if place is None else distribute_tensor(w, *place))
            for w, place in zip(whole, places, strict=True)
        ]
        norms = TensorNorms(params, [None, None, None, 0])
        pieces = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in params]
        out[name] = norms(pieces).sqrt()
    out["whole"] = torch.tensor(
        [w.norm() for w in whole[:3]] + [w.norm() for w in whole[3]], dtype=torch.float64
    )

    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 2), line, [Shard(0)]))
    parameter.grad = DTensor.from_local(torch.full((4, 2), rank + 1.0), line, [Partial()])
    clip = AdaGC([parameter], warmup_steps=0)
    out["partial norm"] = clip.step().pre_norm
    out["partial gradient"] = full(parameter.grad)

    parameter.grad = distribute_tensor(torch.ones(4, 2), line, [Shard(0)])
    if rank == 1:
        parameter.grad.to_local()[0, 0] = float("nan")
    clip.step()
    out["poisoned"] = full(parameter.grad)
    out["gamma"] = clip.gamma.clone()

    parameter.grad = distribute_tensor(torch.tensor([[1.0, 1.0]] * 2 + [[3.0, 3.0]] * 2), line, [Shard(0)])
    out["shard norm"] = AdaGC([parameter], granularity="shard").step().pre_norm
    parameter.grad = None
    out["nobody"] = AdaGC([parameter]).step().pre_norm
    return out


def saved_and_loaded(folder, rank, world):
    """Weights after twenty steps, undisturbed and by way of a distributed checkpoint after ten."""
    weights = {}
    for inside in (False, True):
        kind = "inside" if inside else "attached"
        whole = sharded()
        before, _ = optimizer_of(whole, inside)
        steps(whole, before, range(10), rank, world)
        saved = {"model": whole.state_dict(), "optimizer": get_optimizer_state_dict(whole, before)}
        dcp.save(saved, checkpoint_id=folder / kind)
        steps(whole, before, range(10, STEPS), rank, world)

        again = sharded()
        after, clip = optimizer_of(again, inside)
        loaded = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, after)}
        dcp.load(loaded, checkpoint_id=folder / kind)
        again.load_state_dict(loaded["model"])
        set_optimizer_state_dict(again, after, loaded["optimizer"])
        assert clip.steps == 10
        steps(again, after, range(10, STEPS), rank, world)
        for name, model in (("undisturbed", whole), ("resumed", again)):
            weights[f"{name} {kind}"] = {key: full(p) for key, p in model.named_parameters()}
    return weights


def measure(rank, world, folder):
    results = {"placed": placed(rank)}
    for inside in (False, True):
        kind = "inside" if inside else "attached"
        results[f"alone {kind}"] = train(Net(), 0, 1, inside)
        results[f"ddp {kind}"] = train(DistributedDataParallel(Net()), rank, world, inside)
        results[f"fsdp {kind}"] = train(sharded(), rank, world, inside)
        grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        results[f"hsdp {kind}"] = train(sharded(mesh=grid), rank, world, inside)

    # Asking for a sharded state dict runs a step on zero gradients, which must not count.
    model = Net()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    clip = AdaGC(model, CLIP)
    clip.attach(optimizer)
    get_optimizer_state_dict(model, optimizer)
    results["steps after a state dict"] = clip.steps
    results |= saved_and_loaded(folder / "checkpoint", rank, world)
    return results


if __name__ == "__main__":
    meet(measure)
