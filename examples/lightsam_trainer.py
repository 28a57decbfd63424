"""LightSAM in the Hugging Face Trainer: another trainer class, and the optimiser.

    python examples/lightsam_trainer.py

The optimiser needs a second forward and backward pass for each batch, which `SAMTrainer` (or
`SAMTrainerMixin` before your own Trainer) runs; with gradient accumulation, too. Everything is made on the
spot, nothing is downloaded.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from weightsmith.training import LightSAM, SAMTrainer


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
            max_steps=40,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=20,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SAMTrainer(
            model,
            arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=(LightSAM, {"lr": 3e-3, "rho": 1e-3, "variant": "adam"}),
        )
        trainer.train()

    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']}: loss {line['loss']}")


if __name__ == "__main__":
    main()
