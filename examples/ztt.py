"""A Zero-Token Transformer on the spot: trained, calibrated, and generating with early exit.

    python examples/ztt.py

The task is to go on counting in steps: the first two numbers of a row say how far apart they are. A converted
Llama follows: it begins as its base and is trained on from there. Nothing is downloaded.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.training import ZTTConfig, ZTTForCausalLM, ZTTOptions, calibrate_exit, convert_to_ztt

VOCABULARY, LENGTH = 32, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rows(number: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (number, 1), generator=random)
    step = torch.randint(1, 6, (number, 1), generator=random)
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


def train(model: torch.nn.Module, steps: int) -> float:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = rows(32, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = ZTTForCausalLM(ZTTConfig(num_cycles=3, **SIZES))
    print(f"4 layers, 3 cycles: loss {train(model, 120):.3f}")

    found = calibrate_exit(model, [{"input_ids": rows(64, seed=-1)}], max_loss_increase=0.02)
    full = found.curve[0]
    print(
        f"exit: {found.chosen.cycles:.2f} of {full.cycles:.0f} cycles at loss {found.chosen.loss:.3f} "
        f"(all cycles: {full.loss:.3f}); the signal's spread is {found.spread:.3f}"
    )
    for prompt in rows(2, seed=-2)[:, :4]:
        text = model.generate(prompt[None], max_new_tokens=6, do_sample=False)[0].tolist()
        once = model.generate(prompt[None], max_new_tokens=6, do_sample=False, num_cycles=1)[0].tolist()
        print(f"{text[:4]} goes on {text[4:]}; with one cycle {once[4:]}")

    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    before = train(base, 60)
    cycled = convert_to_ztt(base, ZTTOptions(num_cycles=2))
    print(f"a Llama at {before:.3f}, converted and trained on: {train(cycled, 60):.3f}")


if __name__ == "__main__":
    main()
