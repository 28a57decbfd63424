"""MEAP in a plain PyTorch loop: hide a part of what the model reads, ask for the same predictions.

    python examples/meap.py

A Llama of a few thousand weights reads rows whose second half repeats the first. Labels are the clean rows,
and scoring never sees a mask token. In a run this short MEAP is the slower one: copying is what masking makes
hard to learn at first.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.training import meap_mask_inputs

VOCABULARY, MASK, LENGTH = 32, 32, 24


def rows(count: int, noise: torch.Generator) -> torch.Tensor:
    half = torch.randint(0, VOCABULARY, (count, LENGTH // 2), generator=noise)
    return torch.cat([half, half], dim=1)


def train(mask_ratio: float, steps: int = 150) -> float:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY + 1,  # the last row is the mask token's
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        clean = rows(16, noise)
        masked = meap_mask_inputs(clean, MASK, mask_ratio, seed=step)
        optimizer.zero_grad()
        model(input_ids=masked, labels=clean).loss.backward()
        optimizer.step()

    held_out = rows(64, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.eval()(input_ids=held_out, labels=held_out).loss.item()


if __name__ == "__main__":
    for ratio in (0.0, 0.15):
        print(f"mask_ratio {ratio}: loss on clean held-out rows {train(ratio):.3f}")
