"""AlphaDecay in a plain PyTorch loop: one line after the optimiser.

    python examples/alphadecay_torch.py

A small causal transformer learns the bytes of a text. At the start the exponents tell no more than shapes:
the MLP's long matrices look light-tailed and get more decay. As structure grows, exponents fall and decays
follow.
"""

import pathlib

import torch
from torch import nn

from weightsmith.training import AlphaDecay

WIDTH, LENGTH = 64, 48


class Model(nn.Module):
    """Two blocks over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 3 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next byte."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.blocks(self.embed(ids), mask=mask, is_causal=True))


def main(steps: int = 120) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(pathlib.Path(pathlib.__file__).read_bytes()))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0)
    decay = AlphaDecay(model, optimizer, interval=40)  # nothing else changes in the loop

    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (8,))
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step}, loss {loss.item():.2f}, first block:")
            for name, value in list(decay.weight_decays().items())[:4]:
                print(f"    {name.split('.', 3)[-1]:26s} alpha {decay.alphas()[name]:.2f}  decay {value:.2f}")


if __name__ == "__main__":
    main()
