"""Sections of `training_parts.py` on clipping: AdaGC, global clipping, pytorch_optimizer's AdaGC."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from training_parts import Contestant, Section

from weightsmith.training import AdaGC, AdaGCAdamW

LONG = 10**9
CLIP = {"warmup_steps": 1, "init": "ema"}


def wander(parameters: list[Any], number: int) -> None:
    """Gradients whose norms spread by a fifth around 1, as a run's do: six in ten exceed 1.05 gamma."""
    noise = torch.Generator().manual_seed(number + 1000)
    sizes = torch.exp(0.2 * torch.randn(len(parameters), generator=noise)).tolist()
    gradients = [parameter.grad for parameter in parameters]
    norms = torch.stack(torch._foreach_norm(gradients)).tolist()
    torch._foreach_mul_(gradients, [size / norm for size, norm in zip(sizes, norms, strict=True)])


def settled(parameters: list[Any], clip: AdaGC) -> AdaGC:
    """A clipper past its warm-up, with running means where wandering gradients hold them."""
    names = [f"param_{i}" for i in range(len(parameters))]
    clip.load_state_dict({"version": 1, "step": 1000, "names": names, "gamma": [0.88] * len(names)})
    return clip


def global_clip(parameters: list[Any]) -> Callable[[], Any]:
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)


def warming(parameters: list[Any]) -> Callable[[], Any]:
    return AdaGC(parameters, warmup_steps=LONG).step


def after(parameters: list[Any]) -> Callable[[], Any]:
    return settled(parameters, AdaGC(parameters, CLIP)).step


def agree_on_warm_up() -> str:
    ours = [torch.nn.Parameter(torch.zeros(7)), torch.nn.Parameter(torch.zeros(3, 2))]
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in ours]
    clip = AdaGC(ours, warmup_steps=LONG)
    for seed in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 3
            q.grad = p.grad.clone()
        clip.step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    return "gradients equal those of clip_grad_norm_ in warm-up to 1e-6"


def clip_and(
    optimizer: Callable[[list[Any]], Any], clip: Callable[[list[Any]], Callable[[], Any]] | None
) -> Any:
    def make(parameters: list[Any]) -> Callable[[], Any]:
        inner = optimizer(parameters)
        first = clip(parameters) if clip else None

        def call() -> None:
            if first:
                first()
            inner.step()

        return call

    return make


def ours_inside(parameters: list[Any]) -> Callable[[], Any]:
    optimizer = AdaGCAdamW(parameters, lr=1e-5, clip=CLIP)
    settled(parameters, optimizer.clip)
    return optimizer.step


def peer(parameters: list[Any], warmup_steps: int = 2, **options: Any) -> Any:
    from pytorch_optimizer import AdaGC as PeerAdaGC

    # Its warm-up is one step shorter than its argument says.
    return PeerAdaGC(parameters, lr=1e-5, warmup_steps=warmup_steps, weight_decay=0.01, **options)


def agree_on_adamw() -> str:
    ours = [torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(3, 2))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    clip = {"warmup_steps": 3, "eps": 1e-8}
    inside = AdaGCAdamW(ours, lr=1e-2, clip=clip)
    other = peer(theirs, 4)
    other.param_groups[0]["lr"] = 1e-2
    before, plain = AdaGC(apart, clip), torch.optim.AdamW(apart, lr=1e-2, fused=True)
    for seed in range(20):
        for trio in zip(ours, theirs, apart, strict=True):
            gradient = torch.randn(trio[0].shape, generator=torch.Generator().manual_seed(seed))
            for parameter in trio:
                parameter.grad = gradient * (1 + seed % 3)
        inside.step()
        other.step()
        before.step()
        plain.step()
        for p, q, r in zip(ours, theirs, apart, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
    return "weights of all three AdaGC + AdamW equal to 1e-5 after each of 20 steps, warm-up included"


def sections(layers: int) -> Iterable[Section]:
    fused = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True)  # noqa: E731
    foreach = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, foreach=True)  # noqa: E731
    warm, late, torchs = "AdaGC.step, warm-up", "AdaGC.step, after", "clip_grad_norm_"
    yield Section(
        "clip",
        "Clipping alone",
        [Contestant(torchs, global_clip), Contestant(warm, warming), Contestant(late, after)],
        agree_on_warm_up,
        wander,
        [(warm, torchs, 1.15), (late, torchs, 1.05)],
    )
    inside, apart = "AdaGCAdamW", "AdaGC.step + AdamW(fused)"
    kozistr, plain = "pytorch_optimizer AdaGC", "clip_grad_norm_ + AdamW(fused)"
    bare = "AdamW(fused), no clipping"
    yield Section(
        "optimizers",
        "Clipping and AdamW",
        [
            Contestant(bare, clip_and(fused, None)),
            Contestant(plain, clip_and(fused, global_clip)),
            Contestant("clip_grad_norm_ + AdamW(foreach)", clip_and(foreach, global_clip)),
            Contestant(apart, clip_and(fused, after)),
            Contestant(inside, ours_inside),
            Contestant(kozistr, lambda parameters: peer(parameters).step),
        ],
        agree_on_adamw,
        wander,
        [(inside, plain, 1.0), (inside, apart, 1.0), (inside, kozistr, 1 / 1.3)],
    )
    yield Section(
        "warm-up",
        "Clipping and AdamW, in AdaGC's warm-up",
        [
            Contestant(bare, clip_and(fused, None)),
            Contestant(inside, lambda p: AdaGCAdamW(p, lr=1e-5, clip={"warmup_steps": LONG}).step),
            Contestant(kozistr, lambda parameters: peer(parameters, LONG, foreach=True).step),
        ],
        agree_on_adamw,
        wander,
        [(inside, kozistr, 1 / 10)],
    )
