"""What is known of a model before it runs."""

import pytest
import torch
import transformers

from weightsmith.evaluation.models import position_limit

SIZES = {
    "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=8),
    "OPT": dict(
        hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        word_embed_proj_dim=16,
    ),
    "GPTJ": dict(n_embd=16, n_layer=2, n_head=2, n_positions=8, rotary_dim=4),
    "Llama": dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8,
    ),
    "XGLM": dict(d_model=16, ffn_dim=16, num_layers=2, attention_heads=2, max_position_embeddings=8),
    "Bloom": dict(hidden_size=16, n_layer=2, n_head=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_positions_end_where_a_model_can_no_longer_run(kind):
    tokens = dict(vocab_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**tokens, **SIZES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def runs(length):
        try:
            with torch.inference_mode():
                model(input_ids=torch.full((1, length), 5), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    limit = position_limit(model)
    assert limit == (8 if kind in ("GPT2", "OPT", "GPTJ") else None)
    assert [runs(8), runs(9), runs(40)] == [True, limit is None, limit is None]
