"""Tiny models of several architectures, made on the spot."""

import pytest
import torch
from torch import nn

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24}
SIZES = {"num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
MODELS = {
    "llama": HEADS | SIZES,
    "gpt2": {"n_head": 2, "n_embd": 16, "n_layer": 2, "vocab_size": 32, "n_positions": 32},
    "opt": SIZES | {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "gemma2": HEADS | SIZES | {"head_dim": 8, "sliding_window": 4},
    "gpt_neox": SIZES | {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24},
    "mixtral": HEADS | SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": HEADS
    | SIZES
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    | {"shared_expert_intermediate_size": 24},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2, "vocab_size": 32},
    "gemma3": {
        "text_config": HEADS | SIZES | {"head_dim": 8, "sliding_window": 4, "vocab_size": 128},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
}


@pytest.fixture
def build():
    """`build("llama")` -> a random decoder of that architecture, in eval mode, weights that are not tiny."""

    def make(kind, **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(MODELS[kind] | options))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture
def tokens():
    """Three batches of token numbers; the last rows of each end in padding."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        ids = torch.randint(2, 32, (4, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[2:, 7:] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


@pytest.fixture
def mlp():
    """Three linear layers; the task of `points`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


@pytest.fixture
def points():
    """Batches of inputs and classes."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(32, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator))
        for _ in range(3)
    ]


@pytest.fixture
def cross_entropy():
    """Loss of a model on such a batch."""
    return lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
