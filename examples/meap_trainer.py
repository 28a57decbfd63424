"""MEAP in the Hugging Face Trainer: a collator around the one you have.

    python examples/meap_trainer.py

A small Llama with a tokenizer that knows no mask token: one is added for training, evaluation stays clean,
and afterwards model and tokenizer are what they were. Everything is made on the spot, nothing is downloaded.
"""

import tempfile

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from weightsmith.training import DataCollatorForMEAP, MEAPTrainer, resolve_mask_token, strip_mask_token

TEXT = "The sun rises in the east and sets in the west. What rises in the east is the sun. " * 8


def main() -> None:
    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=280, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    rows = [tokenizer(TEXT[start : start + 200]) for start in range(0, 400, 5)]

    mask = resolve_mask_token(tokenizer, model, add_mask_token=True)
    base = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = MEAPTrainer(
            model,
            arguments,
            train_dataset=rows[:64],
            eval_dataset=rows[64:],
            data_collator=DataCollatorForMEAP(base, tokenizer, mask_ratio=0.15),
        )
        trainer.train()

    for line in trainer.state.log_history:
        if "meap/masked" in line:
            print(
                f"step {line['step']}: loss {line['loss']:.3f} {line['meap/masked']:.1%} of the input masked"
            )
        elif "eval_loss" in line:
            print(f"step {line['step']}: loss on clean held-out rows {line['eval_loss']:.3f}")
    strip_mask_token(model, tokenizer, mask)
    print(
        f"`{mask.token}` is gone: {len(tokenizer)} tokens, {model.get_input_embeddings().num_embeddings} rows"
    )


if __name__ == "__main__":
    main()
