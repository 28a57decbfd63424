"""AdaGC in a plain PyTorch loop: a fault in one small tensor, under global clipping and under AdaGC.

    python examples/adagc_torch.py

Every fifth step the gradient of one bias comes out 1,000 times too large, as a failing chip might make it.
The global norm scales everything down on such steps and still lets the wrong bias gradient into Adam's
moments; AdaGC clips that tensor alone.
"""

import torch

from weightsmith.training import AdaGC


def train(clipping: str, faults: bool, steps: int = 400) -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clip = AdaGC(model, init="ema", warmup_steps=20)
    x = torch.randn(512, 16)
    y = torch.sin(x[:, :4].sum(1, keepdim=True))

    for step in range(steps):
        rows = torch.randint(0, 512, (64,))
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        if faults and step > 100 and step % 5 == 0:
            model[0].bias.grad *= 1000

        if clipping == "adagc":
            clip.step()  # instead of clip_grad_norm_
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with torch.no_grad():
        return (model(x) - y).square().mean().item()


if __name__ == "__main__":
    for clipping in ("global", "adagc"):
        clean, faulty = train(clipping, faults=False), train(clipping, faults=True)
        print(f"{clipping:>6} clipping: loss {clean:.4f} without faults, {faulty:.4f} with them")
