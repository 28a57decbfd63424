"""Tiny models, and one warm server that forks processes to be killed."""

import multiprocessing

import pytest

from weightsmith.testbed import model_config, write_model_folder


@pytest.fixture(scope="session")
def forks():
    """A server that has imported everything once; each process of it starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "weightsmith.training.trainer", "weightsmith.training.loop"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory):
    """A folder like the bed's, with a Llama of a few thousand parameters and no weights."""
    import json

    folder = write_model_folder("xs", tmp_path_factory.mktemp("config"))
    small = {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 96,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps({**model_config("xs"), **small, **heads}))
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A random GPT-2 with dropout and a tokenizer of its own, trained here; tied embeddings, stored in
    bfloat16."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from weightsmith.testbed import text

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text("docs", "test")], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return folder
