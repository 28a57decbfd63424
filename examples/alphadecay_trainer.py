"""AlphaDecay in the Hugging Face Trainer: one line in `callbacks`, and a plot of what it did.

    python examples/alphadecay_trainer.py

A small Llama learns to count; everything is made on the spot, nothing is downloaded. The base decay is the
Trainer's own `weight_decay`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightsmith.reports import plot_decay
from weightsmith.training import AlphaDecayCallback


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    rows = [torch.arange(start, start + 16) % 32 for start in range(32)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        "counting",
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        weight_decay=0.5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = AlphaDecayCallback(interval=15)
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[callback])
    trainer.train()

    for name, value in list(callback.decay.weight_decays().items())[:7]:
        print(f"{name}: alpha {callback.decay.alphas()[name]:.2f}, decay {value:.2f}")
    plot_decay("counting/alphadecay.jsonl", "counting/alphadecay.svg")
    print("counting/alphadecay.svg")


if __name__ == "__main__":
    main()
