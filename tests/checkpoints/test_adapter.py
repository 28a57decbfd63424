"""LoRA adapters: against peft's own merge, in closed form, in any tile, and the kinds that are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def write_adapter(tmp_path):
    """A function that writes an adapter folder: `write_adapter(base, {"name": array}, r=2, ...)`."""

    def write(base, tensors, name="adapter", **config):
        folder = tmp_path / name
        folder.mkdir()
        values = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base),
            "r": 2,
            "lora_alpha": 8,
            **config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(values))
        save_file(
            {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "adapter_model.safetensors"
        )
        return folder

    return write


@pytest.fixture
def factors(rng):
    a, b = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
    return {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}


def test_the_map_is_w_plus_scale_times_b_a_and_the_rest_is_the_base(
    write_model, write_adapter, tensors, factors
):
    base = write_model("base", tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = factors.values()
    with Checkpoint.open(write_adapter(base, factors)) as checkpoint:
        expected = tensors[name].astype(np.float64) + 8 / 2 * b.astype(np.float64) @ a
        np.testing.assert_allclose(checkpoint.read(name), expected.ravel(), rtol=1e-5, atol=1e-6)
        for other, values in tensors.items():
            if other != name:
                np.testing.assert_array_equal(checkpoint.read(other), values.ravel())
        assert [other for other in tensors if not checkpoint.stores(other)] == [name]
        raw = checkpoint.read_raw(name, 3, 21).view(np.float32)
        np.testing.assert_array_equal(raw, checkpoint.read(name, 3, 21))
        assert checkpoint.config["model_type"] == "llama"
        assert list(checkpoint.tensors) == sorted(tensors)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 8 / np.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / 2),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, 8 / 2),
        ({"r": 7, "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}}, 8 / 2),
        ({"alpha_pattern": {"roj": 5}}, 8 / 2),  # not a whole path part: peft doesn't match it either
    ],
)
def test_scales_follow_the_config(write_model, write_adapter, tensors, factors, config, scale):
    base = write_model("base", tensors)
    a, b = factors.values()
    name = "model.layers.0.self_attn.q_proj.weight"
    with Checkpoint.open(write_adapter(base, factors, **config)) as checkpoint:
        np.testing.assert_allclose(
            checkpoint.read(name), (tensors[name] + scale * b @ a).ravel(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_any_tile_equals_the_same_part_of_the_whole_bit_for_bit(write_model, write_adapter, rng, transposed):
    rows, columns, rank = 150, 1100, 3
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    inside, outside = (rows, columns) if transposed else (columns, rows)
    a = rng.standard_normal((rank, inside)).astype(np.float32)
    b = rng.standard_normal((outside, rank)).astype(np.float32)
    base = write_model("base", {"h.0.attn.c_attn.weight": weight}, {"model_type": "gpt2"})
    module = "base_model.model.transformer.h.0.attn.c_attn"
    adapter = write_adapter(
        base, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, r=3, lora_alpha=6
    )
    product = (b.astype(np.float64) @ a).T if transposed else b.astype(np.float64) @ a
    with Checkpoint.open(adapter) as checkpoint:
        whole = checkpoint.read("h.0.attn.c_attn.weight")
        np.testing.assert_allclose(whole, (weight + 2 * product).ravel(), rtol=1e-4, atol=1e-5)
        for start, stop in [
            (0, 1),
            (1099, 1101),
            (777, 66_000),
            (columns * 16, columns * 32),
            (164_999, 165_000),
        ]:
            np.testing.assert_array_equal(
                checkpoint.read("h.0.attn.c_attn.weight", start, stop), whole[start:stop]
            )


def test_modules_to_save_and_biases_take_the_place_of_the_bases(write_model, write_adapter, tensors, factors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    base = write_model("base", tensors)
    head, bias = np.full((16, 8), 3, np.float16), np.arange(8, dtype=np.float32)
    saved = {
        **factors,
        "base_model.model.lm_head.weight": head,
        f"{Q}.base_layer.bias": bias,
        "base_model.model.model.norm.modules_to_save.weight": bias + 1,
        "base_model.model.model.norm.original_module.weight": bias + 9,
    }
    with Checkpoint.open(
        write_adapter(base, saved, bias="lora_only", modules_to_save=["lm_head"])
    ) as checkpoint:
        assert checkpoint.read("lm_head.weight").tolist() == [3] * 128
        assert checkpoint.tensors["lm_head.weight"].dtype == "F16"
        assert checkpoint.read_raw("lm_head.weight", 0, 2).view(np.float16).tolist() == [3, 3]
        assert checkpoint.read("model.layers.0.self_attn.q_proj.bias").tolist() == bias.tolist()
        assert checkpoint.read("model.norm.weight").tolist() == (bias + 1).tolist()


def test_an_adapted_checkpoint_can_be_written_out_as_a_model(
    write_model, write_adapter, tensors, factors, tmp_path
):
    adapter = write_adapter(write_model("base", tensors), factors)
    with Checkpoint.open(adapter) as checkpoint:
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()]
        lineage = Lineage("copy", inputs=(Ancestor.of(checkpoint, "model"),))
        side = checkpoint.side_file_map()
        with CheckpointWriter(tmp_path / "out", specs, side_files=side, lineage=lineage) as writer:
            for name in checkpoint.tensors:
                writer.write(name, checkpoint.read(name))
            writer.commit()
        with Checkpoint.open(tmp_path / "out") as out:
            for name in out.tensors:
                np.testing.assert_array_equal(out.read(name), checkpoint.read(name))
            assert set(out.side_file_map()) == {"config.json"}


def test_fingerprints_differ_by_base_factors_and_scale(write_model, write_adapter, tensors, factors):
    base = write_model("base", tensors)
    other = write_model("other", {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1})
    moved = {name: values + 1 for name, values in factors.items()}
    cases = [(base, factors, 8), (other, factors, 8), (base, moved, 8), (base, factors, 9)]
    found = []
    for number, (folder, values, alpha) in enumerate(cases):
        with Checkpoint.open(write_adapter(folder, values, f"a{number}", lora_alpha=alpha)) as checkpoint:
            found.append(checkpoint.fingerprint())
            assert checkpoint.fingerprint(full=True).startswith("full:")
    with Checkpoint.open(write_adapter("/elsewhere", factors, "again"), base=base) as checkpoint:
        assert checkpoint.fingerprint() == found[0]  # where the base lay when it was trained plays no part
    with Checkpoint.open(base) as checkpoint:
        found.append(checkpoint.fingerprint())
    assert len(set(found)) == 5


REFUSED = {
    "another kind": ({"peft_type": "IA3"}, {}, "peft_type is 'IA3', expected LORA"),
    "DoRA": ({"use_dora": True}, {}, "use_dora = True"),
    "a key from the future": ({"use_novelty": {"x": 1}}, {}, "use_novelty = {'x': 1}"),
    "trainable tokens": ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    "a start that moves the base": ({"init_lora_weights": "pissa_niter_4"}, {}, "also moves the base"),
    "a rank the factors don't have": ({"r": 4}, {}, r"rank 2, adapter_config.json says 4"),
    "no alpha": ({"lora_alpha": None}, {}, "q_proj` is None, expected a number > 0"),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, {}, "no regular expression"),
    "a magnitude vector": ({}, {f"{Q}.lora_magnitude_vector": np.ones(8, np.float32)}, "no plain LoRA"),
    "a bias on B": ({}, {f"{Q}.lora_B.bias": np.ones(8, np.float32)}, "no plain LoRA"),
    "a factor alone": (
        {},
        {Q.replace("q_proj", "v_proj") + ".lora_A.weight": np.ones((2, 8), np.float32)},
        "only factor A",
    ),
    "a module the base has not": (
        {},
        {
            Q.replace("q_proj", "v_proj") + ".lora_A.weight": np.ones((2, 8), np.float32),
            Q.replace("q_proj", "v_proj") + ".lora_B.weight": np.ones((8, 2), np.float32),
        },
        r"which the base has not: not there; did you mean `model.layers.0.self_attn.q_proj.weight`",
    ),
    "a product that doesn't fit": (
        {},
        {
            Q.replace("self_attn.q_proj", "mlp.up_proj") + ".lora_A.weight": np.ones((2, 8), np.float32),
            Q.replace("self_attn.q_proj", "mlp.up_proj") + ".lora_B.weight": np.ones((23, 2), np.float32),
        },
        "the product does not fit",
    ),
    "a resized embedding": (
        {},
        {"base_model.model.lm_head.weight": np.ones((17, 8), np.float32)},
        r"leaves `model.embed_tokens.weight` with 16 rows and gives `lm_head.weight` 17;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused_in_one_line(case, write_model, write_adapter, tensors, factors):
    config, extra, message = REFUSED[case]
    folder = write_adapter(write_model("base", tensors), {**factors, **extra}, **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_that_modules_share_are_adapted_together_or_not_at_all(
    write_model, write_adapter, tensors, factors
):
    tensors.pop("lm_head.weight")
    base = write_model("base", tensors, {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
    embedding = tensors["model.embed_tokens.weight"]
    names = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")
    for number, values in enumerate(
        [{names[0]: embedding + 1}, {names[0]: embedding, names[1]: embedding + 1}]
    ):
        with pytest.raises(CheckpointError, match=r"untie the base first|differ"):
            Checkpoint.open(write_adapter(base, values, f"alone{number}"))
    with Checkpoint.open(write_adapter(base, dict.fromkeys(names, embedding + 1), "both")) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), embedding.ravel() + 1)
    with Checkpoint.open(write_adapter(base, {names[0]: embedding}, "unchanged")) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), embedding.ravel())
    low_rank = {
        "base_model.model.lm_head.lora_A.weight": np.ones((2, 8), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((16, 2), np.float32),
    }
    with pytest.raises(CheckpointError, match="shares its weight"):
        Checkpoint.open(write_adapter(base, low_rank, "low"))


def test_low_rank_changes_of_packed_weights_are_refused(write_model, write_adapter, tensors, factors):
    packed = {"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.int8)}
    with pytest.raises(CheckpointError, match="which the base stores as I8"):
        Checkpoint.open(write_adapter(write_model("base", {**tensors, **packed}), factors))


def test_a_base_that_cannot_be_had_is_named(write_adapter, factors, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter without its base model: .*gone: no such folder"):
        Checkpoint.open(write_adapter(tmp_path / "gone", factors))
    with pytest.raises(CheckpointError, match="names no base model"):
        Checkpoint.open(write_adapter("", factors, "b"))
    with pytest.raises(CheckpointError, match="names itself"):
        Checkpoint.open(write_adapter(tmp_path / "c", factors, "c"))


def test_an_adapter_in_pickle_is_refused(write_adapter, write_model, tensors, factors):
    folder = write_adapter(write_model("base", tensors), factors)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="expected the adapter's weights as safetensors"):
        Checkpoint.open(folder)


def test_a_base_handed_in_stays_open(write_adapter, write_model, tensors, factors):
    with Checkpoint.open(write_model("base", tensors)) as base:
        with Checkpoint.open(write_adapter("nowhere", factors), base=base):
            pass
        base.read("model.norm.weight")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_map_equals_pefts_merge(family, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=False, **sizes)
        options = {
            "target_modules": ["q_proj", "up_proj", "down_proj", "embed_tokens"],
            "modules_to_save": ["model.norm"],
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"layers.1.mlp.down_proj": 5},
            "use_rslora": True,
        }
    else:
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8)
        options = {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "bias": "lora_only",
            "fan_in_fan_out": True,
        }
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    changed = 0
    with Checkpoint.open(tmp_path / "adapter", base=tmp_path / "base") as checkpoint:
        for name in checkpoint.tensors:
            expected = merged[name].numpy().ravel()
            np.testing.assert_allclose(checkpoint.read(name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
            changed += not np.array_equal(checkpoint.base.read(name), expected)
    assert changed == (8 if family == "llama" else 16)
