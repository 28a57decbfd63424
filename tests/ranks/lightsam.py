"""LightSAM, SAM and ASAM in one process, replicated (DDP) and sharded (FSDP2, HSDP). See `run_ranks`."""

import copy

import torch
from meeting import meet
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from weightsmith.training.lightsam.optimizer import LightSAM
from weightsmith.training.lightsam.sam import ASAM, SAM

STEPS = 20
MAKERS = {
    "I": lambda params: LightSAM(params, 0.3, 0.2, "I", weight_decay=0.01),
    "II": lambda params: LightSAM(params, 0.05, 0.05, "II"),
    "III": lambda params: LightSAM(params, 0.02, 0.02, "III", weight_decay=0.01),
    "III foreach": lambda params: LightSAM(params, 0.02, 0.02, "III", fused=False),
    "SAM": lambda params: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1),
    "ASAM": lambda params: ASAM(params, torch.optim.AdamW, lr=0.01),
}


class Net(nn.Module):
    """A layer that divides unevenly between two ranks, and a head with fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def loss(model, step, rank, world):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::world]
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model, optimizer, steps, rank, world):
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(model, step, rank, world)
            value.backward()
            return value

        optimizer.step(closure)
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


def sharded(**mesh):
    model = Net()
    fully_shard(model.body, **mesh)
    fully_shard(model, **mesh)
    return model


def measure(rank, world, folder):
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    results = {}
    for name, make in MAKERS.items():
        models = {
            "alone": Net(),
            "ddp": DistributedDataParallel(Net()),
            "fsdp": sharded(),
            "hsdp": sharded(mesh=grid),
        }
        for kind, model in models.items():
            if kind == "hsdp" and name not in ("I", "ASAM"):
                continue  # the others don't add anything up over ranks
            where = (0, 1) if kind == "alone" else (rank, world)
            results[f"{kind} {name}"] = train(model, make(model.parameters()), range(STEPS), *where)

        # Saved half-way through the distributed checkpoint's own door, and continued.
        model = sharded()
        optimizer = make(model.parameters())
        train(model, optimizer, range(10), rank, world)
        # As a file would: loading doesn't copy, and two optimisers must not share state.
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        again = sharded()
        again.load_state_dict(weights)
        resumed = make(again.parameters())
        set_optimizer_state_dict(again, resumed, saved)
        results[f"resumed {name}"] = train(again, resumed, range(10, STEPS), rank, world)
        results[f"undisturbed {name}"] = train(model, optimizer, range(10, STEPS), rank, world)
    return results


if __name__ == "__main__":
    meet(measure)
