"""SeWA in the Hugging Face Trainer: collect the tail of a run, write the chosen mean as a model folder.

    python examples/sewa_trainer.py

A small Llama learns to count from noisy data; everything is made on the spot, nothing is downloaded. The mean
is in `counting/averaged`, an ordinary folder that loads with `from_pretrained`.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightsmith.training import AveragingCallback


def rows(number: int, seed: int, wrong: float = 0.3) -> torch.Tensor:
    """Counting modulo 32 from anywhere; a share of the numbers is wrong."""
    generator = torch.Generator().manual_seed(seed)
    counted = (torch.randint(0, 32, (number, 1), generator=generator) + torch.arange(16)) % 32
    other = torch.randint(0, 32, counted.shape, generator=generator)
    return torch.where(torch.rand(counted.shape, generator=generator) < wrong, other, counted)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    arguments = TrainingArguments(
        "counting",
        max_steps=100,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    held_out, test = rows(64, seed=1), rows(64, seed=2, wrong=0.0)
    callback = AveragingCallback(
        method="sewa",
        num_select=4,
        num_candidates=12,
        start=0.6,
        held_out=[{"input_ids": held_out, "labels": held_out}],
    )
    data = [{"input_ids": row, "labels": row} for row in rows(256, seed=0)]
    model = LlamaForCausalLM(config)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    mean = AutoModelForCausalLM.from_pretrained("counting/averaged")
    with torch.no_grad():
        for name, one in (("last state", model), ("mean", mean)):
            print(f"{name}: test loss {one(input_ids=test, labels=test).loss.item():.3f}")
    print(f"averaged the states after steps {list(callback.selection.chosen_steps)}")


if __name__ == "__main__":
    main()
