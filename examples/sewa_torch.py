"""SeWA in a plain PyTorch loop: keep the last states, let held-out data choose which of them to average.

    python examples/sewa_torch.py

A classifier is trained on noisy labels at a high learning rate, and now and then a bad batch throws it off.
SeWA chooses ten of the last forty states so that the mean of them has a low held-out loss.
"""

import torch
from torch import nn

from weightsmith.training import AveragingOptions, MemoryBank, sewa_select
from weightsmith.training.averaging.choice import by_rule


def samples(number: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 10, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    wrong = torch.rand(number, generator=generator) < noise
    return x, torch.where(wrong, torch.randint(0, 3, (number,), generator=generator), y)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    x, y = samples(1000, noise=0.3, seed=1)
    bank = MemoryBank(max_size=40)

    for step in range(800):
        rows = torch.randint(0, 1000, (64,))
        labels = y[torch.randperm(1000)[:64]] if step % 50 < 2 else y[rows]  # 2 bad batches in 50
        optimizer.zero_grad()
        loss(model, (x[rows], labels)).backward()
        optimizer.step()
        if step >= 400 and step % 10 == 1:
            bank.add(model, step)

    held_out = list(zip(*(part.split(100) for part in samples(500, noise=0.3, seed=2)), strict=True))
    selection = sewa_select(model, bank, held_out, loss, num_select=10)

    test = samples(2000, noise=0.0, seed=3)
    latest = by_rule(AveragingOptions(method="lawa", num_select=10, num_candidates=40), bank.steps)
    with torch.no_grad():
        print(f"last state        test loss {loss(model, test):.3f}")
        for name, chosen in (("mean of latest 10", latest), ("SeWA, 10 of 40", selection)):
            bank.mix(chosen.weights, model)
            print(f"{name:17s} test loss {loss(model, test):.3f}  steps {list(chosen.chosen_steps)}")


if __name__ == "__main__":
    main()
