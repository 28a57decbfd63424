"""TeZO in the Hugging Face Trainer: another trainer class, and the optimiser.

    python examples/tezo_trainer.py

Trains a tiny model by forward passes alone, with gradient accumulation; adapters of a PEFT model are trained
in the same way. Everything is made on the spot, nothing is downloaded.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from weightsmith.training import TeZOAdam, ZOTrainer, memory_report


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
            max_steps=100,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=25,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = ZOTrainer(
            model,
            arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=(TeZOAdam, {"lr": 1e-2, "rank": 32}),
        )
        trainer.train()

    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']}: loss {line['loss']}")
    print(memory_report(trainer.optimizer.optimizer))


if __name__ == "__main__":
    main()
