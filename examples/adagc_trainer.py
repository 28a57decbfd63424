"""AdaGC in the Hugging Face Trainer: one line in `callbacks`.

    python examples/adagc_trainer.py

A Llama of a few thousand weights learns to count; everything is made on the spot, nothing is downloaded.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightsmith.training import AdaGCCallback


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )
    rows = [torch.arange(start, start + 16) % 32 for start in range(32)]
    data = [{"input_ids": row, "labels": row} for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=20,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        clip = AdaGCCallback(init="ema", warmup_steps=10)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clip])
        trainer.train()

    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']}: loss {line['loss']}, clipped {line['adagc/clip_rate']:.0%} of tensors")


if __name__ == "__main__":
    main()
