"""LightSAM in a plain PyTorch loop, beside SAM: how much does the result depend on learning rate and radius?

    python examples/lightsam_torch.py

Two interleaved spirals with a fifth of the training labels wrong. Each optimiser gets the same four settings.
"""

import itertools

import torch

from weightsmith.training import SAM, LightSAM


def spirals(points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % 2
    turn = 5 * torch.rand(points, generator=noise).sqrt()
    angle = turn + labels * torch.pi
    x = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 4
    return x + 0.03 * torch.randn(points, 2, generator=noise), labels


def train(make, steps: int = 400) -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU()
    )
    model.append(torch.nn.Linear(64, 2))
    optimizer = make(model.parameters())
    x, labels = spirals(400, seed=1)
    wrong = torch.rand(400, generator=torch.Generator().manual_seed(2)) < 0.2
    labels = torch.where(wrong, 1 - labels, labels)

    for _ in range(steps):
        rows = torch.randint(0, 400, (64,))

        def closure(rows=rows):  # called at the weights, and again at the perturbed point
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), labels[rows])
            loss.backward()
            return loss

        optimizer.step(closure)

    test_x, test_labels = spirals(1000, seed=3)
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_labels).float().mean().item()


if __name__ == "__main__":
    for name, make in {
        "SAM (SGD)": lambda params, lr, rho: SAM(params, torch.optim.SGD, lr=lr, rho=rho),
        "LightSAM-I": lambda params, lr, rho: LightSAM(params, lr=lr, rho=rho, variant="adagrad_norm"),
    }.items():
        settings = list(itertools.product((0.1, 10.0), (0.1, 10.0)))
        found = [
            train(lambda params, lr=lr, rho=rho, make=make: make(params, lr, rho)) for lr, rho in settings
        ]
        listed = ", ".join(
            f"lr {lr:g} rho {rho:g}: {100 * a:.0f} %" for (lr, rho), a in zip(settings, found, strict=True)
        )
        print(f"{name:>10}: {listed}")
