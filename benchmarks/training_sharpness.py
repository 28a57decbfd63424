"""Sections of `training_parts.py` on two-pass optimisers: LightSAM against SAM as it is used now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from training_parts import Contestant, Section

from weightsmith.training import SAM, LightSAM


class PlainSAM(torch.optim.Optimizer):
    """Plain formulation of the SAM optimiser that most projects copy (davda54/sam)."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """To the perturbed point."""
        norms = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"]]
        norm = torch.norm(torch.stack(norms), p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * scale.to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back, and the base optimiser's update."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def both(optimizer: Any) -> Callable[[], Any]:
    """One update, the gradients of both passes being those that are there."""

    def call() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return call


def contestant(name: str, make: Callable[[list[Any]], Any]) -> Contestant:
    return Contestant(name, lambda parameters: both(make(parameters)))


def peer_sam(parameters: Any, base: Any, **options: Any) -> Any:
    from pytorch_optimizer import SAM as PeerSAM

    return PeerSAM(parameters, base, **options)


def agree() -> str:
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    made = {
        "ours": lambda params: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9),
        "plain": lambda params: PlainSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9),
        "pytorch_optimizer": lambda params: peer_sam(params, torch.optim.SGD, lr=0.1, momentum=0.9),
        "III fused": lambda params: LightSAM(params, fused=True),
        "III foreach": lambda params: LightSAM(params, fused=False),
    }
    models = {name: copy.deepcopy(start) for name in made}
    for name, make in made.items():
        optimizer = make(models[name].parameters())
        for seed in range(5):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                models[name](x).square().mean().backward()
                step()
    for ours, theirs in (("ours", "plain"), ("ours", "pytorch_optimizer"), ("III fused", "III foreach")):
        for p, q in zip(models[ours].parameters(), models[theirs].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    return "our SAM, the plain one and pytorch_optimizer's equal to 1e-5 after 5 steps"


def leave(parameters: list[Any], number: int) -> None:
    """Gradients are not consumed here; only AdaGC's sections change them."""


class WholeStep:
    """Forward, backward and update of a Llama of the benchmark's size on 256 tokens."""

    def parameters(self, layers: int) -> list[Any]:
        """Of a new model."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2560,
            num_hidden_layers=layers,
            num_attention_heads=12,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config)
        self.tokens = torch.randint(0, 32000, (1, 256))
        return list(self.model.parameters())

    def loss(self) -> Any:
        """Forward."""
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def once(self, make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Callable[[], Any]]:
        """A step of an ordinary optimiser."""

        def made(parameters: list[Any]) -> Callable[[], Any]:
            optimizer = make(parameters)

            def call() -> None:
                optimizer.zero_grad()
                self.loss().backward()
                optimizer.step()

            return call

        return made

    def twice(self, make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Callable[[], Any]]:
        """A step of a two-pass optimiser."""

        def made(parameters: list[Any]) -> Callable[[], Any]:
            optimizer = make(parameters)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss()
                loss.backward()
                return loss

            return lambda: optimizer.step(closure)

        return made


def sections(layers: int) -> Iterable[Section]:
    sgd, adam = torch.optim.SGD, torch.optim.AdamW
    first, second, third = "LightSAM-I", "LightSAM-II", "LightSAM-III"
    plain, ours, peer = "plain formulation of SAM + SGD", "SAM + SGD", "pytorch_optimizer SAM + SGD"
    yield Section(
        "sam-sgd",
        "Two-pass update without state: perturb, restore, update",
        [
            contestant(plain, lambda p: PlainSAM(p, sgd, lr=1e-5)),
            contestant(peer, lambda p: peer_sam(p, sgd, lr=1e-5)),
            contestant(ours, lambda p: SAM(p, sgd, lr=1e-5)),
            contestant(first, lambda p: LightSAM(p, 1e-5, variant="I")),
        ],
        agree,
        leave,
        [(first, plain, 0.85), (first, peer, 0.85)],
    )
    kernel, lists = "plain formulation of SAM + AdamW(fused)", "plain formulation of SAM + AdamW(foreach)"
    yield Section(
        "sam-adam",
        "Two-pass update with Adam's state: perturb, restore, update",
        [
            contestant(kernel, lambda p: PlainSAM(p, adam, lr=1e-5, fused=True)),
            contestant(lists, lambda p: PlainSAM(p, adam, lr=1e-5, foreach=True)),
            contestant("SAM + AdamW(fused)", lambda p: SAM(p, adam, lr=1e-5, fused=True)),
            contestant(third, lambda p: LightSAM(p, 1e-5)),
        ],
        agree,
        leave,
        [(third, kernel, 1.2), (third, lists, 0.6)],
    )
    yield Section(
        "light-adagrad",
        "LightSAM-II, and III without kernels",
        [
            contestant(second, lambda p: LightSAM(p, 1e-5, variant="II")),
            contestant("LightSAM-III, foreach", lambda p: LightSAM(p, 1e-5, fused=False)),
        ],
        agree,
        leave,
    )
    whole = WholeStep()
    once, third_step = "AdamW(fused) step, one pass", f"{third} step, two passes"
    yield Section(
        "whole",
        "Whole training step, 256 tokens",
        [
            Contestant(once, whole.once(lambda p: adam(p, lr=1e-5, fused=True))),
            Contestant("SAM + AdamW(fused) step", whole.twice(lambda p: SAM(p, adam, lr=1e-5, fused=True))),
            Contestant(f"{first} step, two passes", whole.twice(lambda p: LightSAM(p, 1e-5, variant="I"))),
            Contestant(third_step, whole.twice(lambda p: LightSAM(p, 1e-5))),
        ],
        agree,
        leave,
        [(third_step, once, 2.1)],
        parameters=whole.parameters,
    )
