"""The rarer keys of mergekit's pages: each is honoured or refused by name, and the list of them is whole."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from weightsmith.errors import PageError
from weightsmith.merging import merge, plan_merge
from weightsmith.merging.mergekit import KEYS, REFUSED
from weightsmith.merging.tokenizer_rule import RULE_KEYS, SOURCE_KEYS, TOKEN_KEYS

from .made import CONFIG, random_model, read, save

PEER = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"

# Of mergekit 0.1.5: the model of each place, as the test below reads it where mergekit is installed.
THEIRS = {
    "page": {
        "merge_method",
        "base_model",
        "models",
        "slices",
        "modules",
        "parameters",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
        "chat_template",
    },
    "module": {"models", "slices", "parameters"},
    "slice": {"sources", "base_model", "parameters", "residual_weight"},
    "source": {"model", "layer_range", "parameters"},
    "model": {"model", "parameters"},
    "reference": {"model", "lora", "override_architecture"},
    "path": {"path", "revision"},
    "tokenizer": {"source", "tokens", "pad_to_multiple_of"},
    "token": {"source", "force"},
    "model_token": {"kind", "model", "token_id", "token"},
    "zero": {"kind"},
    "condition": {"filter", "value"},
}
LIST_KEYS = """
import json
from mergekit import common, config
from mergekit.tokenizer import config as tokenizer
places = {
    "page": config.MergeConfiguration,
    "module": config.OutputModuleDefinition,
    "slice": config.OutputSliceDefinition,
    "source": config.InputSliceDefinition,
    "model": config.InputModelDefinition,
    "reference": common.ModelReference,
    "path": common.ModelPath,
    "tokenizer": tokenizer.TokenizerConfig,
    "token": tokenizer.TokenEmbeddingConfig,
    "model_token": tokenizer.ModelTokenEmbedding,
    "zero": tokenizer.ZeroEmbedding,
    "condition": config.ConditionalParameter,
}
print(json.dumps({place: sorted(model.model_fields) for place, model in places.items()}))
"""


@pytest.mark.parametrize("place", THEIRS)
def test_every_key_of_mergekit_is_honoured_or_refused_by_name(place):
    honoured = {
        **KEYS,
        **SOURCE_KEYS,
        "tokenizer": RULE_KEYS,
        "token": TOKEN_KEYS,
        "condition": ("filter", "value"),
    }
    assert THEIRS[place] == {*honoured[place], *(REFUSED if place == "reference" else ())}


def test_the_list_of_mergekits_keys_is_that_of_the_installed_mergekit():
    if not PEER.exists():
        pytest.skip("mergekit is not installed in .venv-peers")
    done = subprocess.run([PEER, "-c", LIST_KEYS], capture_output=True, text=True, check=True)
    assert {place: set(keys) for place, keys in json.loads(done.stdout.splitlines()[-1]).items()} == THEIRS


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A base and two fine-tunes with a text decoder of four layers and a vision tower of three."""
    root = tmp_path_factory.mktemp("images")
    config = {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]},
        "vision_config": {"num_hidden_layers": 3},
    }

    def made(seed, near=None):
        text = {f"language_model.{name}": v for name, v in random_model(seed, layers=4).items()}
        rng = np.random.default_rng(seed)
        for layer in range(3):
            text[f"vision_tower.encoder.layers.{layer}.mlp.weight"] = rng.standard_normal((4, 4), np.float32)
        text["vision_tower.patch.weight"] = rng.standard_normal((4, 4), np.float32)
        text["multi_modal_projector.weight"] = rng.standard_normal((4, 4), np.float32)
        return text

    for seed, name in enumerate(("base", "m1", "m2")):
        save(root / name, made(seed), "F32", config)
    return root


def page_of(root, modules, **more):
    return {
        "merge_method": "linear",
        "base_model": str(root / "base"),
        "modules": modules,
        "parameters": {"weight": 1.0},
        **more,
    }


def models(root, *names, **parameters):
    return [
        {"model": str(root / name), "parameters": {key: v[at] for key, v in parameters.items()}}
        for at, name in enumerate(names)
    ]


def test_each_module_is_merged_from_its_own_models_with_its_own_parameters(images, tmp_path):
    made = page_of(
        images,
        {
            "text_decoder": {"models": models(images, "m1", "m2", weight=(3, 1))},
            "vision_tower": {
                "models": models(images, "base", "m1"),
                "parameters": {"weight": [{"filter": "layers", "value": [2, 4]}], "normalize": False},
            },
            "multi_modal_projector": {"models": models(images, "m2")},
        },
    )
    merge(made, tmp_path / "out")
    found, (base, m1, m2) = read(tmp_path / "out"), (read(images / name) for name in ("base", "m1", "m2"))
    assert set(found) == set(base)
    for name, values in found.items():
        if name.startswith("language_model"):
            wanted = (3 * m1[name] + m2[name]) / 4
        elif name.startswith("vision_tower.encoder"):
            layer = int(name.split(".")[3])  # the gradient runs over the tower's own three layers
            wanted = (2 + layer) * (base[name] + m1[name])
        else:
            wanted = m2[name] if "projector" in name else base[name] + m1[name]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_layers_of_one_module_are_stacked_anew_and_counted_in_its_own_config(images, tmp_path):
    def source(name, first, last):
        return {"model": str(images / name), "layer_range": [first, last]}

    made = page_of(
        images,
        {
            "text_decoder": {
                "slices": [{"sources": [source("m1", 0, 2)]}, {"sources": [source("m2", 3, 4)]}]
            },
            "vision_tower": {
                "slices": [{"sources": [source("base", 0, 3)]}, {"sources": [source("m1", 2, 3)]}]
            },
            "multi_modal_projector": {"models": models(images, "m1")},
        },
        merge_method="passthrough",
        parameters={},
    )
    merge(made, tmp_path / "out")
    found, m1, m2 = read(tmp_path / "out"), read(images / "m1"), read(images / "m2")
    up = "language_model.model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[up.format(2)], m2[up.format(3)])
    tower = "vision_tower.encoder.layers.{}.mlp.weight"
    np.testing.assert_array_equal(found[tower.format(3)], m1[tower.format(2)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"num_hidden_layers": 3, "layer_types": ["a", "b", "d"]}
    assert config["vision_config"]["num_hidden_layers"] == 4
    assert f"{up.format(3)}" not in found


def test_a_model_without_parts_is_one_module_and_stacks_of_layers_go_by_their_names_too(images, tmp_path):
    base = random_model(0)
    for seed, name in enumerate(("base", "m1")):
        save(tmp_path / name, random_model(seed, near=base))
    one = page_of(tmp_path, {"default": {"models": models(tmp_path, "m1")}})
    plain = {**one, "models": one["modules"]["default"]["models"]}
    del plain["modules"]
    merge(one, tmp_path / "one")
    merge(plain, tmp_path / "plain")
    for name, values in read(tmp_path / "plain").items():
        np.testing.assert_array_equal(values, read(tmp_path / "one")[name])
    named = {
        "vision_tower.encoder.layers": {"models": models(images, "m1")},
        "default": {"models": models(images, "m2")},
    }
    merge(page_of(images, named), tmp_path / "named")
    found, m1, m2 = read(tmp_path / "named"), read(images / "m1"), read(images / "m2")
    for name, values in found.items():
        owner = m1 if name.startswith("vision_tower.encoder.layers.") else m2
        np.testing.assert_array_equal(values, owner[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: made["modules"].pop("vision_tower"),
            r"^modules: says nothing of `vision_tower`, which holds vision_tower\.\S+$",
        ),
        (
            lambda made: made["modules"].update(audio={"models": made["modules"]["text_decoder"]["models"]}),
            r"^modules.audio: the models have no such module; known: .*text_decoder",
        ),
        (
            lambda made: made["modules"]["text_decoder"].update(slices=[{}]),
            r"^modules.text_decoder: expected either `models` or `slices`$",
        ),
        (
            lambda made: made["modules"]["text_decoder"].update(base_model="x"),
            r"^modules.text_decoder.base_model: no such key",
        ),
    ],
)
def test_what_is_wrong_with_modules_is_told(images, change, message):
    parts = ("text_decoder", "vision_tower", "multi_modal_projector")
    made = page_of(images, {part: {"models": models(images, "m1")} for part in parts})
    change(made)
    with pytest.raises(PageError, match=message):
        plan_merge(made)


def test_encoders_and_decoders_are_modules_of_their_own(tmp_path):
    names = ("encoder.block.0.wi.weight", "decoder.block.0.wi.weight", "shared.weight", "lm_head.weight")
    for seed, model in enumerate(("m1", "m2", "m3")):
        rng = np.random.default_rng(seed)
        tensors = {name: rng.standard_normal((4, 4), np.float32) for name in names}
        save(tmp_path / model, tensors, "F32", {"model_type": "t5"})
    parts = {"encoder": "m1", "decoder": "m2", "shared": "m3"}
    made = page_of(tmp_path, {part: {"models": models(tmp_path, model)} for part, model in parts.items()})
    merge({**made, "base_model": str(tmp_path / "m1")}, tmp_path / "out")
    found = read(tmp_path / "out")
    for name, model in zip(names, ("m1", "m2", "m3", "m3"), strict=True):
        np.testing.assert_array_equal(found[name], read(tmp_path / model)[name])


def test_a_model_may_be_named_in_parts(family, tmp_path):
    parts = {"model": {"path": str(family / "m1"), "revision": None}, "lora": None}
    made = {
        "merge_method": "task_arithmetic",
        "base_model": {"model": str(family / "base")},
        "models": [{"model": parts}],
    }
    merge(made, tmp_path / "out")
    merge({**made, "models": [{"model": str(family / "m1")}]}, tmp_path / "plain")
    for name, values in read(tmp_path / "plain").items():
        np.testing.assert_array_equal(values, read(tmp_path / "out")[name])
    with pytest.raises(PageError, match=r"models\[0\]\.model\.model: expected text, found 3"):
        plan_merge({**made, "models": [{"model": {"model": 3}}]})


def test_numbers_and_switches_may_be_spelt_as_yaml_1_1_does(family):
    made = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / name)} for name in ("m1", "m2")],
        "parameters": {"normalize": "no", "density": [{"filter": "mlp", "value": "5e-1"}, {"value": "1"}]},
    }
    made["models"][0]["parameters"] = {"weight": ["0.25", "0.75"]}
    made["parameters"]["rescale"] = "yes"
    with plan_merge(made) as plan:
        found = {output.spec.name: output.method for output in plan.outputs}
    up = found["model.layers.1.mlp.up_proj.weight"]
    assert (up.normalize, up.density, up.weight, up.rescale) == (False, (0.5, 0.5), (0.75, 1.0), "l1")
    assert found["model.norm.weight"].density == (1.0, 1.0)


def test_a_key_that_mergekit_reads_and_never_uses_is_told(family, tmp_path):
    source = {"model": str(family / "m1"), "layer_range": [0, 2]}
    made = {"merge_method": "passthrough", "slices": [{"sources": [source], "residual_weight": 0.5}]}
    with plan_merge(made) as plan:
        assert plan.warnings == ("`residual_weight` has no effect, as it has none in mergekit",)


TALK = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
SAID = {
    "chatml": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
    "alpaca": "Be kind\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be kind[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


def with_template(folder, tensors, template, as_file=False):
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    side = {
        "tokenizer.json": json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
            }
        ).encode()
    }
    if as_file and template:
        side["chat_template.jinja"] = template.encode()
    elif template:
        config["chat_template"] = template
    side["tokenizer_config.json"] = json.dumps(config).encode()
    return save(folder, tensors, config=CONFIG, side=side)


@pytest.mark.parametrize("name", SAID)
def test_a_template_by_name_is_what_transformers_then_applies(family, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    with_template(tmp_path / "base", read(family / "base"), "{{ 'old' }}")
    with_template(tmp_path / "m1", read(family / "m1"), None)
    made = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "m1")}],
        "chat_template": name,
    }
    merge(made, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert said == SAID[name]


def test_auto_takes_the_template_that_most_models_have_and_says_so(family, tmp_path):
    with_template(tmp_path / "base", read(family / "base"), "{{ 'base' }}")
    with_template(tmp_path / "m1", read(family / "m1"), "{{ 'tuned' }}")
    with_template(tmp_path / "m2", read(family / "m2"), "{{ 'tuned' }}\n", as_file=True)
    made = {
        "method": "task_arithmetic",
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / "m1"), str(tmp_path / "m2")],
    }
    with plan_merge({**made, "chat_template": "auto"}) as plan:
        assert plan.notes == ("chat template: that of m1, m2",)
        assert plan.side_files["chat_template.jinja"] == b"{{ 'tuned' }}"
        assert "chat_template" not in json.loads(plan.side_files["tokenizer_config.json"])
        assert plan.lineage.parameters["chat_template"] == "auto"
    with plan_merge(made) as plan:  # without a word the tokenizer's own stays
        assert (
            json.loads(plan.side_files["tokenizer_config.json"].read_bytes())["chat_template"]
            == "{{ 'base' }}"
        )
    with plan_merge({**made, "chat_template": "{{ messages | length }}"}) as plan:
        assert plan.side_files["chat_template.jinja"] == b"{{ messages | length }}"


def test_the_last_tensors_take_all_models_of_the_last_slice(exact_family, tmp_path):
    def source(name):
        return {"model": str(exact_family / name), "layer_range": [0, 1]}

    made = {
        "merge_method": "linear",
        "slices": [{"sources": [source("m1")]}, {"sources": [source("m1"), source("m2"), source("m3")]}],
    }
    merge(made, tmp_path / "out")
    found, models = read(tmp_path / "out"), [read(exact_family / name) for name in ("m1", "m2", "m3")]
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_allclose(found[name], sum(m[name] for m in models) / 3, rtol=1e-5, atol=1e-8)
