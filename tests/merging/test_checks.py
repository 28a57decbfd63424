"""Models that don't fit each other are refused by name before anything is written."""

import json

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, InputError, PageError
from weightsmith.merging import merge, plan_merge

from .made import page, random_model, read, save


def variant(family, folder, change=lambda tensors: None, **options):
    """m1 with something changed, beside an unchanged base."""
    tensors = read(family / "m1")
    change(tensors)
    save(folder / "base", read(family / "base"), **{k: v for k, v in options.items() if k == "dtype"})
    save(folder / "m1", tensors, **options)
    return page(folder, "task_arithmetic", ["m1"])


def test_a_shape_that_differs_names_tensor_shapes_and_models(family, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:39]

    wanted = (
        r"^m1: lm_head.weight is \[39, 16\], base has \[40, 16\]; if these are token embeddings, the "
        r"vocabularies differ\. Nothing was written\.$"
    )
    with pytest.raises(CheckpointError, match=wanted):
        plan_merge(variant(family, tmp_path, change))


def test_a_tensor_that_is_missing_or_extra_is_named(family, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"^m1: has no tensor `{name}`, base has \[24, 16\]"):
        plan_merge(variant(family, tmp_path / "one", lambda tensors: tensors.pop(name)))

    def more(tensors):
        tensors["model.layers.1.bias"] = np.zeros(4, np.float32)

    with pytest.raises(CheckpointError, match=r"^m1: has a tensor `model.layers.1.bias` that base lacks"):
        plan_merge(variant(family, tmp_path / "two", more))


def test_buffers_that_loaders_make_may_be_missing(family, tmp_path):
    def more(tensors):
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    with plan_merge(variant(family, tmp_path, more)) as plan:
        assert not any("inv_freq" in output.spec.name for output in plan.outputs)


def test_another_architecture_is_refused_although_all_shapes_agree(family, tmp_path):
    made = variant(family, tmp_path, config={"model_type": "mistral"})
    with pytest.raises(CheckpointError, match=r"^m1: is a `mistral`, base is a `llama`"):
        plan_merge(made)


def test_settings_that_change_what_weights_mean_are_a_warning(family, tmp_path):
    with plan_merge(variant(family, tmp_path, config={"num_attention_heads": 8})) as plan:
        assert plan.warnings == (
            "m1 and base differ in num_attention_heads (8 against 4); the output has the latter",
        )


def test_quantised_weights_are_refused(family, tmp_path):
    made = variant(family, tmp_path, config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(CheckpointError, match=r"^m1: .*awq; expected plain float weights"):
        plan_merge(made)


def tokenizer(*tokens, **more):
    page = {"model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}}, **more}
    return {"tokenizer.json": json.dumps(page).encode()}


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_tokenizers_that_number_tokens_differently_are_refused_unless_told_otherwise(
    family, tmp_path, method
):
    save(tmp_path / "base", read(family / "base"), side=tokenizer("a", "b", "c"))
    save(tmp_path / "m1", read(family / "m1"), side=tokenizer("a", "c", "b"))
    made = page(tmp_path, method, ["base", "m1"] if method == "linear" else ["m1"])
    with pytest.raises(
        CheckpointError, match="m1: its tokenizer differs from that of base: token 'b' is 2 and not 1"
    ):
        plan_merge(made)
    merge(made | {"tokenizer": "base"}, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer("a", "b", "c")["tokenizer.json"]


def test_tokenizers_that_are_only_spelt_differently_are_the_same(family, tmp_path):
    spaced = json.loads(tokenizer("a", "b")["tokenizer.json"])
    save(tmp_path / "base", read(family / "base"), side=tokenizer("a", "b"))
    save(tmp_path / "m1", read(family / "m1"), side={"tokenizer.json": json.dumps(spaced, indent=4).encode()})
    plan_merge(page(tmp_path, "task_arithmetic", ["m1"])).close()


def test_a_token_that_one_tokenizer_adds_is_seen(family, tmp_path):
    added = tokenizer("a", added_tokens=[{"id": 1, "content": "<think>"}])
    save(tmp_path / "base", read(family / "base"), side=tokenizer("a"))
    save(tmp_path / "m1", read(family / "m1"), side=added)
    with pytest.raises(CheckpointError, match="token '<think>' is 1 and not absent"):
        plan_merge(page(tmp_path, "task_arithmetic", ["m1"]))


def test_nothing_is_written_when_a_check_fails(family, tmp_path):
    made = variant(
        family, tmp_path, lambda tensors: tensors.pop("lm_head.weight"), config={"architectures": []}
    )
    with pytest.raises(CheckpointError):
        merge(made | {"models": [str(tmp_path / "nowhere")]}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m1"]


def test_a_file_stays_open_no_longer_than_its_plan(family, tmp_path):
    import os

    before = set(os.listdir("/proc/self/fd"))
    merge(page(family, "ties"), tmp_path / "out")
    made = variant(family, tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError):
        plan_merge(made)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "tsvm",
            {"exclude": ["*lm_head*", "*self_atn*"]},
            r"exclude\[1\]: pattern `\*self_atn\*` matches no tensor; the nearest is "
            r"`model\.layers\.0\.self_attn\.\w_proj\.weight`",
        ),
        (
            "ties",
            {"density": [{"filter": "mlp.up_prj", "value": 0.5}, {"value": 1.0}]},
            r"density\[0\]\.filter: filter `mlp\.up_prj` matches no tensor; the nearest is "
            r"`model\.layers\.0\.mlp\.up_proj\.weight`",
        ),
    ],
)
def test_a_pattern_without_a_tensor_names_the_nearest(family, method, options, said):
    with pytest.raises(PageError, match=f"^{said}$"):
        plan_merge(page(family, method, **options))


def test_a_pattern_may_name_a_tied_head_that_no_file_stores(tmp_path):
    for seed, name in enumerate(("base", "m1", "m2", "m3")):
        tensors = random_model(seed)
        del tensors["lm_head.weight"]
        save(tmp_path / name, tensors, config={"tie_word_embeddings": True})
    with plan_merge(page(tmp_path, "tsvm", exclude=["*lm_head*", "*embed*"])) as plan:
        assert plan.warnings == ()


def test_on_a_page_of_mergekit_a_filter_without_a_tensor_is_a_warning(family):
    made = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "models": [
            {
                "model": str(family / "m1"),
                "parameters": {"weight": [{"filter": "experts", "value": 0.5}, {"value": 1.0}]},
            }
        ],
    }
    with plan_merge(made) as plan:
        assert [warning.partition(";")[0] for warning in plan.warnings] == [
            "filter `experts` matches no tensor"
        ]


@pytest.mark.parametrize("method", ["tsvm", "resm"])
def test_more_models_than_a_matrix_has_directions_is_one_warning_of_the_plan_and_the_report(method, tmp_path):
    base = random_model(0, hidden=2, inner=8)
    save(tmp_path / "base", base)
    for seed in (1, 2, 3):
        save(tmp_path / f"m{seed}", random_model(seed, near=base, hidden=2, inner=8))
    made = merge(page(tmp_path, method, split_fused=False), tmp_path / "out")
    assert made.warnings == (
        "8 tensors have fewer directions than the 3 models to merge "
        "(model.layers.0.mlp.down_proj.weight: 2); there only the largest changes count",
    )
    with plan_merge(page(tmp_path, method, models=["m1", "m2"], exclude=["*k_proj*", "*lm_head*"])) as plan:
        assert plan.warnings == ()


def test_a_fused_layer_that_cannot_be_told_apart_is_refused_before_anything_is_written(tmp_path):
    for seed, name in enumerate(("base", "m1")):
        tensors = random_model(seed)
        tensors["model.layers.0.self_attn.qkv_proj.weight"] = np.ones((30, 16), np.float32)
        save(tmp_path / name, tensors)
    with pytest.raises(InputError, match=r"can't tell the parts of this fused layer \(30, 16\)"):
        plan_merge(page(tmp_path, "tsvm", ["m1"]))
