"""Configs that say what layers compute: what can't be right is refused, what may be is said."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError

from .made import family, gemma, gpt2, ids, llama, logits, near
from .test_plan import stored


def changed(model, **fields):
    """A fine-tune with another config, loaded as such a model is."""
    config = copy.deepcopy(model.config)
    for field, value in fields.items():
        setattr(config, field, value)
    made = type(model)(config).eval()
    made.load_state_dict(near(model, 1).state_dict())
    return made


def rotary(model, **values):
    return {"rope_parameters": {**model.config.rope_parameters, **values}}


@pytest.mark.parametrize(
    ("made", "fields", "words"),
    [
        (llama, {"hidden_act": "gelu"}, "candidate 1: hidden_act = gelu, base has silu"),
        (gemma, {"hidden_activation": "silu"}, "hidden_activation = silu, base has gelu_pytorch_tanh"),
        (gpt2, {"activation_function": "relu"}, "activation_function = relu, base has gelu_new"),
    ],
)
def test_another_activation_is_refused(made, fields, words):
    base = made()
    with pytest.raises(InputError, match=words):
        LayerPool(base, [changed(base, **fields)])


@pytest.mark.parametrize(
    ("made", "fields", "words"),
    [
        (llama, {"rms_norm_eps": 0.5}, "rms_norm_eps = 0.5 (base has 1e-06)"),
        (gpt2, {"layer_norm_epsilon": 0.5}, "layer_norm_epsilon = 0.5 (base has 1e-05)"),
        (gemma, {"sliding_window": 2}, "sliding_window = 2 (base has 4)"),
        (gemma, {"layer_types": ["full_attention"] * 6}, "layer_types = ['full_attention', "),
    ],
)
def test_another_value_of_what_layers_compute_is_said_with_both_values(made, fields, words, caplog):
    base = made()
    LayerPool(base, [changed(base, **fields)])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("candidate 1: ")
    assert words in line
    assert line.endswith("its layers would run with the values of base")


def test_rotary_positions_of_a_longer_context_are_said(caplog):
    base = llama()
    LayerPool(base, [changed(base, **rotary(base, rope_theta=5e5)), near(base, 2)])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "candidate 1: rope_parameters.rope_theta = 500000.0 (base has 10000.0); its layers"
    )


def test_what_no_layer_reads_is_not_worth_a_word(caplog):
    base = llama()
    other = changed(
        base, max_position_embeddings=4096, eos_token_id=5, attention_dropout=0.1, use_cache=False,
        initializer_range=0.3, _name_or_path="elsewhere", architectures=["Other"], my_note="mine",
    )  # fmt: skip
    LayerPool(base, [other])
    assert not caplog.records


def test_a_layer_of_another_epsilon_is_measured_as_it_will_be_loaded(tmp_path, caplog):
    base, (_, two) = family()
    folders = stored(tmp_path, models=(base, (changed(base, rms_norm_eps=0.5), two)))
    plan = TailorPlan.of(Configuration.of(4, [1], {0: [1], 3: [1]}), folders[0], folders[1:])
    plan.save_pretrained(tmp_path / "out")
    assert "one: rms_norm_eps = 0.5 (base has 1e-06)" in caplog.text
    models = [type(base).from_pretrained(folder).eval() for folder in folders]
    pool = LayerPool(models[0], models[1:])
    written = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(logits(pool.assemble(plan.configuration)), written)
    assert torch.equal(logits(pool.build(plan.configuration)), written)
    assert not torch.equal(logits(models[1], ids(1, 3)), logits(changed(base), ids(1, 3)))  # it does matter


def test_a_folder_of_another_activation_is_not_written_from(tmp_path):
    base, (_, two) = family()
    folders = stored(tmp_path, models=(base, (changed(base, hidden_act="gelu"), two)))
    plan = TailorPlan.of(Configuration.of(4, [1], {0: [1]}), folders[0], folders[1:])
    with pytest.raises(InputError, match="one: hidden_act = gelu, base has silu"):
        plan.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
