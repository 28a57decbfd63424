"""TeZO in a plain PyTorch loop, beside MeZO: forward passes alone, and what Adam then keeps in memory.

    python examples/tezo.py

A small network is fitted to a smooth function by two losses a step and no gradient; then a metric that has
no derivative, the share of points with the right sign, is climbed by the same optimiser.
"""

import torch

from weightsmith.training import MeZOAdam, TeZOAdam, memory_report


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1))


def main() -> None:
    torch.manual_seed(1)
    x = torch.randn(256, 32)
    y = torch.sin(x[:, :1]) + x[:, 1:2]
    for name, make in {
        "TeZO-Adam": lambda params: TeZOAdam(params, lr=3e-3, rank=32),
        "MeZO-Adam": lambda params: MeZOAdam(params, lr=3e-3),
    }.items():
        model = network()
        optimizer = make(model.named_parameters())
        losses = [
            optimizer.step(lambda model=model: (model(x) - y).square().mean()).item() for _ in range(400)
        ]
        kept = memory_report(optimizer)
        print(
            f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.2f}; beside the weights it keeps "
            f"{kept.vectors + kept.dense} bytes of means and squares and {kept.factors} of factors"
        )

    model = network()
    optimizer = TeZOAdam(model.named_parameters(), lr=1e-2, rho=0.05, rank=32, maximize=True)

    def right() -> float:
        return ((model(x) > 0) == (y > 0)).float().mean().item()

    before = right()
    for _ in range(200):
        optimizer.step(right)
    print(f"right signs: {before:.0%} -> {right():.0%}")


if __name__ == "__main__":
    main()
