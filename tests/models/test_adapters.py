"""LoRA adapters saved by peft merge as the models that peft makes of them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

from weightsmith.merging import merge, merge_state_dicts

transformers_logging.disable_progress_bar()

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, bos_token_id=1, eos_token_id=2
)
KINDS = {
    "llama": (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "llama, rank-stabilised": (
        LLAMA,
        {"target_modules": ["k_proj"], "r": 9, "lora_alpha": 6, "use_rslora": True},
    ),
    "gpt2": (GPT2, {"target_modules": ["c_attn"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
}
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(params=KINDS)
def adapters(request, tmp_path):
    """A base, two adapters on it as folders, and the weights peft merges them to."""
    config, options = KINDS[request.param]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    full = []
    for name in ("a", "b"):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            LoraConfig(task_type="CAUSAL_LM", **options),
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name
        )
        full.append(weights(loaded.merge_and_unload()))
    return tmp_path, weights(base), full


def weights(model):
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "resm"])
def test_adapters_merge_like_the_models_peft_makes_of_them(adapters, method):
    folder, base, full = adapters
    page = {"method": method, "base": str(folder / "base"), "models": [str(folder / "a"), str(folder / "b")]}
    merge(page, folder / "merged")
    found = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    if method == "linear":
        wanted = {name: (full[0][name] + full[1][name]) / 2 for name in base}
    elif method == "task_arithmetic":
        wanted = {name: full[0][name] + full[1][name] - base[name] for name in base}
    else:
        config = found.config.to_dict()
        wanted = merge_state_dicts(base, full, method, config=config)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5)
    changed = [name for name in base if not torch.equal(weights(found)[name], base[name])]
    assert len(changed) == sum(not torch.equal(full[0][name], base[name]) for name in base) > 0

    # The same numbers again as logits, so that names and layouts are those the architecture reads.
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model.load_state_dict(wanted, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-3)


def test_an_adapter_and_a_full_fine_tune_merge_with_each_other(adapters):
    folder, base, full = adapters
    tuned = AutoModelForCausalLM.from_pretrained(folder / "base")
    tuned.load_state_dict(full[1], strict=False)
    tuned.save_pretrained(folder / "tuned")
    page = {"method": "ties", "base": str(folder / "base"), "density": 0.5}
    merge(page | {"models": [str(folder / "a"), str(folder / "tuned")]}, folder / "mixed")
    merge(page | {"models": [str(folder / "a"), str(folder / "b")]}, folder / "adapters")
    mixed, both = (weights(AutoModelForCausalLM.from_pretrained(folder / x)) for x in ("mixed", "adapters"))
    for name in base:
        torch.testing.assert_close(mixed[name], both[name], rtol=0, atol=1e-6)
