"""Models small enough to be made in every test run."""

import pytest

from weightsmith.testbed import model_config, write_model_folder


def tiny_llama(folder, **changes):
    """A two-layer Llama with the bed's tokenizer, random weights, saved in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_model_folder("xs", folder)
    base = {
        key: value for key, value in model_config("xs").items() if key not in ("architectures", "model_type")
    }
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**base, **small, "num_key_value_heads": 2, "head_dim": 8, **changes})
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a random tiny model of the bed."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def uniform(tmp_path_factory):
    """Folder of a model that gives every token the same probability."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_llama(tmp_path_factory.mktemp("uniform"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """Folder of a random tiny GPT-2 with a tokenizer of its own, trained here."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from weightsmith.testbed import text

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text("docs", "test")], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
