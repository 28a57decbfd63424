"""Sections of `training_parts.py` on weight decay and averaging: AlphaDecay's look at the spectra and its
step, SeWA's iteration.

Peers: WeightWatcher; the published AlphaDecay loop, autograd through the stacked mixture and TWA's projected
gradient as plain formulations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from training_parts import Contestant, Section, parameters_with_gradients

from weightsmith.tensors.esd import alpha_hill, esd
from weightsmith.training import AlphaDecay, MemoryBank, SeWAOptions, sewa_select
from weightsmith.training.averaging.objective import Objective
from weightsmith.training.averaging.slots import slots_of

DECAY = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
CANDIDATES, BATCH = 100, 256
SELECTED, ITERATIONS = 10, 200  # SeWA's defaults
LAYERS_60M = 8


class Blocks(nn.Module):
    """Parameters as an embedding, linear layers inside blocks, and norms: what AlphaDecay needs to know of a
    model.
    """

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__()
        matrices = [p for p in parameters if p.ndim == 2 and p.shape[0] < 30_000]
        self.layers = nn.ModuleList(linear(p) for p in matrices)
        known = {id(p) for p in matrices}
        self.rest = nn.ParameterList(p for p in parameters if id(p) not in known)


def linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    return layer


def matrices(layers: int, hidden: int = 512, width: int = 1376) -> list[Any]:
    """The projections of a Llama of 60 M weights with 8 layers, as initialised."""
    torch.manual_seed(0)
    shapes = ([(hidden, hidden)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]) * layers
    return [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]


def nothing(parameters: list[Any], number: int) -> None:
    """Every call does the same work."""


# ---- the look at the spectra


def ours_refresh(parameters: list[Any]) -> Callable[[], Any]:
    model = Blocks(parameters)
    return AlphaDecay(model, torch.optim.AdamW(model.parameters(), **DECAY)).refresh


def published_alphas(parameters: list[Any]) -> list[float]:
    """The published loop in plain words: singular values of a copy of each matrix, their squares' upper
    half.
    """
    alphas = []
    for parameter in parameters:
        eigenvalues = torch.square(torch.linalg.svdvals(parameter.data.clone().float())).sort().values
        middle = len(eigenvalues) // 2
        logs = eigenvalues.log()
        count = len(eigenvalues) - middle
        alphas.append((1 + count / (logs[middle:].sum() - count * logs[middle])).item())
    return alphas


def published_refresh(parameters: list[Any]) -> Callable[[], Any]:
    return lambda: published_alphas(parameters)


def agree_on_exponents() -> str:
    parameters = matrices(1)
    largest = 0.0
    for parameter, theirs in zip(parameters, published_alphas(parameters), strict=True):
        largest = max(largest, abs(alpha_hill(parameter.detach()).item() - theirs))
    assert largest <= 1e-4, largest
    return f"exponents equal to {largest:.0e}"


def watcher(parameters: list[Any]) -> Callable[[], Any]:
    import logging

    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    model = Blocks(parameters)
    return lambda: weightwatcher.WeightWatcher(model=model).analyze(plot=False, min_evals=50)


def agree_with_watcher() -> str:
    import weightwatcher

    model = Blocks(matrices(1)[:1])
    watch = weightwatcher.WeightWatcher(model=model)
    theirs = torch.as_tensor(sorted(watch.get_ESD(layer=int(watch.describe().layer_id[0]))))
    ours = esd(model.layers[0].weight.detach())
    torch.testing.assert_close(ours / ours[-1], (theirs / theirs[-1]).double(), rtol=1e-3, atol=1e-6)
    return "spectra equal to 1e-3 (WeightWatcher also scans for the tail's start; we take the upper half)"


# ---- the optimiser's step


def adamw(**options: Any) -> Callable[[list[Any]], Callable[[], Any]]:
    def make(parameters: list[Any]) -> Callable[[], Any]:
        return torch.optim.AdamW(parameters, **DECAY, **options).step

    return make


def decayed(mode: str, **options: Any) -> Callable[[list[Any]], Callable[[], Any]]:
    """The step between two looks at the spectra."""

    def make(parameters: list[Any]) -> Callable[[], Any]:
        model = Blocks(parameters)
        optimizer = torch.optim.AdamW(parameters, **DECAY, **options)
        decay = AlphaDecay(model, optimizer, mode=mode, interval=10**9)
        names = [matrix.name for matrix in decay.matrices]
        factors = {name: 0.67 + 2.33 * index / len(names) for index, name in enumerate(names)}
        state = {"step": 1, "alpha": dict.fromkeys(names, 2.0), "factor": factors}
        decay.load_state_dict({**state, "base": dict.fromkeys(names, DECAY["weight_decay"])})
        return optimizer.step

    return make


def agree_on_steps() -> str:
    results = []
    for make in (
        decayed("decoupled"),
        decayed("decoupled", foreach=True),
        decayed("decoupled", fused=True),
        decayed("groups", foreach=True),
        decayed("groups", fused=True),
    ):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(60, 60)), nn.Parameter(torch.randn(70, 60))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        step = make(parameters)
        for _ in range(3):
            step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
    return "both modes take the same step to 1e-6"


# ---- SeWA's iteration


def network(layers: int) -> list[Any]:
    """An MLP of a million weights; the first list entry carries the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 700), nn.Tanh(), nn.Linear(700, 10)
    )
    parameters = list(model.parameters())
    HELD["model"] = model
    HELD["batch"] = (torch.randn(BATCH, 256), torch.randint(0, 10, (BATCH,)))
    bank = MemoryBank(CANDIDATES)
    for step in range(CANDIDATES):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.01 * torch.randn(parameter.shape))
        bank.add(model, step)
    HELD["bank"] = bank
    return parameters


HELD: dict[str, Any] = {}
"""Model, batch and candidates of the section at work; contestants only get parameters."""


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def forward_backward(parameters: list[Any]) -> Callable[[], Any]:
    def call() -> None:
        HELD["model"].zero_grad()
        loss(HELD["model"], HELD["batch"]).backward()

    return call


def bound(readings: int) -> Callable[[list[Any]], Callable[[], Any]]:
    """One forward and backward pass, and readings of all candidates at the speed of a copy."""

    def make(parameters: list[Any]) -> Callable[[], Any]:
        both = forward_backward(parameters)
        # A copy of half of them moves as many bytes as reading them all.
        half = torch.randn(CANDIDATES // 2, sum(p.numel() for p in parameters))
        target = torch.empty_like(half)

        def call() -> None:
            both()
            for _ in range(readings):
                target.copy_(half)

        return call

    return make


def iteration(active: int) -> Callable[[list[Any]], Callable[[], Any]]:
    def make(parameters: list[Any]) -> Callable[[], Any]:
        weights = torch.zeros(CANDIDATES, dtype=torch.float64)
        weights[torch.randperm(CANDIDATES, generator=torch.Generator().manual_seed(1))[:active]] = 1 / active
        objective = Objective(HELD["model"], HELD["bank"], [HELD["batch"]], loss)
        objective.__enter__()
        return lambda: objective.gradient(weights)

    return make


def whole_selection(parameters: list[Any]) -> Callable[[], Any]:
    model, bank, batches = HELD["model"], HELD["bank"], [HELD["batch"]]
    options = SeWAOptions(steps=ITERATIONS)
    return lambda: sewa_select(model, bank, batches, loss, num_select=SELECTED, options=options)


def repeated(
    make: Callable[[list[Any]], Callable[[], Any]], times: int
) -> Callable[[list[Any]], Callable[[], Any]]:
    def made(parameters: list[Any]) -> Callable[[], Any]:
        call = make(parameters)
        return lambda: [call() for _ in range(times)]

    return made


def stacked_gradient(mask: torch.Tensor, *, product: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the mask by autograd through the stacked candidates: their weighted sum, or one
    matrix-vector product.
    """
    model, bank = HELD["model"], HELD["bank"]
    mask = mask.clone().requires_grad_()

    def mix(stack: torch.Tensor) -> torch.Tensor:
        return torch.mv(stack.T, mask) if product else (mask[:, None] * stack).sum(0)

    mixed = {
        slot.name: mix(bank._values[slot.name]).reshape(slot.values.shape) / mask.sum()
        for slot in slots_of(model)
    }
    value = nn.functional.cross_entropy(
        torch.func.functional_call(model, mixed, HELD["batch"][0]), HELD["batch"][1]
    )
    return value, torch.autograd.grad(value, mask)[0]


def stacked(product: bool) -> Callable[[list[Any]], Callable[[], Any]]:
    mask = torch.full((CANDIDATES,), 0.1)
    return lambda parameters: lambda: stacked_gradient(mask, product=product)


def projected(parameters: list[Any]) -> Callable[[], Any]:
    """TWA's step in plain words: gradient as one vector, onto the span of the candidates and back, SGD."""
    basis, _ = torch.linalg.qr(torch.cat([v.float() for v in HELD["bank"]._values.values()], 1).T)
    basis = basis.T.contiguous()
    both = forward_backward(parameters)
    optimizer = torch.optim.SGD(parameters, lr=1e-9)

    def call() -> None:
        both()
        gradient = torch.cat([parameter.grad.detach().reshape(-1) for parameter in parameters])
        onto = torch.mm(basis.T, torch.mm(basis, gradient.reshape(-1, 1))).reshape(-1)
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.grad.data = onto[start:stop].reshape(parameter.shape).clone()
            start = stop
        optimizer.step()

    return call


def agree_on_gradients() -> str:
    network(0)
    mask = 0.05 + 0.9 * torch.rand(CANDIDATES, generator=torch.Generator().manual_seed(2))
    value, expected = stacked_gradient(mask)
    weights = (mask / mask.sum()).double()
    with Objective(HELD["model"], HELD["bank"], [HELD["batch"]], loss) as objective:
        found, dots = objective.gradient(weights)
    ours = (dots - weights.dot(dots)) / mask.sum().double()
    torch.testing.assert_close(torch.tensor(found), value.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    return "the gradient of the mask equals autograd's to 1e-3"


def sections(layers: int) -> Iterable[Section]:
    """What `training_parts.py` runs of this module."""
    refresh, published = (
        "AlphaDecay: refresh",
        "svdvals of each matrix (plain formulation of the published loop)",
    )
    yield Section(
        "spectra",
        "AlphaDecay: exponents of the 56 matrices of a 60 M Llama",
        [Contestant(refresh, ours_refresh), Contestant(published, published_refresh)],
        agree_on_exponents,
        nothing,
        [(refresh, published, round(1 / 1.7, 2))],
        lambda _: matrices(LAYERS_60M),
    )
    yield Section(
        "weightwatcher",
        "AlphaDecay's exponents against WeightWatcher's analysis, one block (7 matrices)",
        [Contestant(refresh, ours_refresh), Contestant("WeightWatcher: analyze", watcher)],
        agree_with_watcher,
        nothing,
        [(refresh, "WeightWatcher: analyze", 0.5)],
        lambda _: matrices(1),
    )
    kinds: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    for kind, options in kinds.items():
        plain = f"AdamW {kind}"
        decoupled, groups = f"{plain} + AlphaDecay, decoupled", f"{plain} + AlphaDecay, groups"
        yield Section(
            f"decay-{kind}",
            f"AlphaDecay between two looks: the optimiser's step, {kind}",
            [
                Contestant(plain, adamw(**options)),
                Contestant(decoupled, decayed("decoupled", **options)),
                Contestant(groups, decayed("groups", **options)),
            ],
            agree_on_steps,
            nothing,
            [(decoupled, plain, 1.05), (groups, plain, 1.05)],
            parameters_with_gradients,
        )
    selection = f"SeWA: a selection, {ITERATIONS} iterations"
    many = f"forward, backward, one reading, {ITERATIONS} times"
    yield Section(
        "whole-selection",
        f"SeWA: {SELECTED} of {CANDIDATES} candidates of a million weights chosen",
        [Contestant(selection, whole_selection), Contestant(many, repeated(bound(1), ITERATIONS))],
        agree_on_gradients,
        nothing,
        [(selection, many, 1.3)],
        network,
    )
    # Over such a selection 25 to 33 candidates are in use on average.
    full, usual = f"SeWA: iteration, {CANDIDATES} candidates in use", "SeWA: iteration, 30 in use"
    limit, needed, autograd, product, twa = (
        "forward, backward, one reading",
        "forward, backward, two readings",
        "autograd through the weighted sum",
        "autograd through one matrix-vector product",
        "TWA's step (plain formulation)",
    )
    yield Section(
        "selection",
        f"SeWA: one iteration with {CANDIDATES} candidates of a million weights",
        [
            Contestant(full, iteration(CANDIDATES)),
            Contestant(usual, iteration(30)),
            Contestant(limit, bound(1)),
            Contestant(needed, bound(2)),
            Contestant(autograd, stacked(product=False)),
            Contestant(product, stacked(product=True)),
            Contestant(twa, projected),
        ],
        agree_on_gradients,
        nothing,
        [(usual, limit, 1.3), (full, limit, 1.3), (usual, autograd, 0.2), (usual, twa, round(1 / 1.5, 2))],
        network,
    )
