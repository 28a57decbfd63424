"""TeZO in one process and sharded by FSDP2 over several that see parts of every batch. See `run_ranks`."""

import io

import torch
from meeting import meet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from weightsmith.errors import InputError
from weightsmith.training import LOZO, MeZO, TeZO
from weightsmith.training.tezo import pieces
from weightsmith.training.tezo.export import changes

STEPS = 12
CASES = {
    "sgd": {},
    "momentum": {"variant": "momentum", "weight_decay": 0.1},
    "adam": {"variant": "adam"},
    "lion": {"variant": "lion"},
    "snapshot": {"variant": "adam", "restore": "snapshot"},
    "refreshed": {"variant": "momentum", "refresh_interval": 5},
}


class Net(nn.Module):
    """Rows that divide unevenly, a bias that does, and a head with fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5, dtype=torch.float64)
        self.middle = nn.Conv1d(5, 7, 1, dtype=torch.float64)
        self.head = nn.Linear(7, 1, dtype=torch.float64)

    def forward(self, x):
        inner = self.middle(torch.tanh(self.body(x))[..., None])[..., 0]
        return self.head(torch.tanh(inner))


def sharded(**mesh):
    model = Net()
    fully_shard(model.body, **mesh)
    return fully_shard(model, **mesh)


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def optimizer_of(model, case, **more):
    return TeZO(model.named_parameters(), 0.02, rank=3, model=model, **CASES[case], **more)


def steps(model, optimizer, numbers, rank=0, world=1):
    for step in numbers:
        rows = batch(step) if world == 1 else batch(step).split((5, 4))[rank]
        optimizer.step(lambda rows=rows: loss(model, rows), weight=len(rows))


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model):
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def refusals(mesh):
    """What is said to those who ask for more than rows."""
    model = sharded(mesh=mesh)
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    stacked = nn.Parameter(distribute_tensor(torch.ones(2, 4, 4), mesh, [Shard(0)]))
    asked = {
        "no model": lambda: TeZO(model.named_parameters()),
        "branch": lambda: TeZO(model.named_parameters(), model=model, restore="branch"),
        "auto": lambda: TeZO(model.named_parameters(), model=model, rank="auto"),
        "factors": lambda: TeZO(model.named_parameters(), model=model, save_factors=True),
        "columns": lambda: TeZO([("w", columns)], model=model),
        "stacked": lambda: TeZO([("w", stacked)], model=model, stacked=("w",)),
        "MeZO": lambda: MeZO(model.named_parameters(), model=model),
        "LOZO": lambda: LOZO(model.named_parameters(), model=model),
        "export": lambda: changes(TeZO(model.named_parameters(), model=model, freeze_1d=True)),
    }
    said = {}
    for name, call in asked.items():
        try:
            call()
        except InputError as wrong:
            said[name] = str(wrong)
    return said


def measure(rank, world, folder):
    pieces.BLOCK = 4  # blocks of noise that begin in one process's rows and end in another's
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))
    results = {}
    for case in CASES:
        model = Net()
        steps(model, optimizer_of(model, case, process_group=None), range(STEPS))
        results[f"alone {case}"] = weights(model)
        for name, mesh in (("fsdp", line), ("hsdp", grid)):
            model = sharded(mesh=mesh)
            optimizer = optimizer_of(model, case)
            steps(model, optimizer, range(STEPS), rank, world)
            results[f"{name} {case}"] = weights(model)

    # Five steps sharded, the others alone from the gathered weights and state.
    model = sharded(mesh=line)
    optimizer = optimizer_of(model, "adam")
    steps(model, optimizer, range(5), rank, world)
    state = optimizer.state_dict()
    state["state"] = {
        place: {
            key: full(value) if isinstance(value, torch.Tensor) else value for key, value in entry.items()
        }
        for place, entry in state["state"].items()
    }
    stored = io.BytesIO()
    torch.save(state, stored)
    alone = Net()
    alone.load_state_dict(weights(model))
    goes_on = optimizer_of(alone, "adam", process_group=None)
    goes_on.load_state_dict(torch.load(io.BytesIO(stored.getvalue())))
    steps(alone, goes_on, range(5, STEPS))
    results["gone on"] = weights(alone)
    results["refused"] = refusals(line)
    return results


if __name__ == "__main__":
    meet(measure)
