"""What is pruned and what stays dense, by kind and name, never by shape."""

import pytest
import torch
from torch import nn

from weightsmith.compression.nm import MagnitudeOptions, MaskProPruner, WandaOptions, prune_
from weightsmith.compression.nm.targets import dense_stacks, find_targets, matches
from weightsmith.errors import InputError


def names(model, **options):
    return [target.name for target in find_targets(model, MagnitudeOptions(**options))]


def test_all_linear_layers_of_a_llama_but_not_its_output_or_embedding(build):
    model = build("llama")
    found = names(model)
    assert len(found) == 14
    assert all(name.startswith("model.layers.") for name in found)


@pytest.mark.parametrize("ignore", [("lm_head",), ()])
def test_the_output_layer_stays_dense_whatever_is_ignored(build, ignore):
    assert not any("lm_head" in name for name in names(build("llama"), ignore=ignore))
    tied = build("llama", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not any("lm_head" in name for name in names(tied, ignore=ignore))


def test_layers_of_gpt2_are_grouped_along_their_first_axis(build):
    found = find_targets(build("gpt2"), MagnitudeOptions())
    assert len(found) == 8
    assert {target.dim for target in found} == {0}
    model = build("gpt2")
    prune_(model, options=MagnitudeOptions())
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert ((weight != 0).unflatten(0, (-1, 4)).sum(1) == 2).all()


def test_stacked_experts_are_pruned_where_their_axis_is_named_and_routers_never(build):
    model = build("mixtral")
    assert not any("expert" in name or "gate" in name.split(".") for name in names(model))
    stacked = next(name for name, p in model.named_parameters() if p.ndim == 3 and "down" in name)
    masks = prune_(model, options=MagnitudeOptions(experts={stacked.split(".")[-1]: 2}))
    parameter = model.get_parameter(stacked)
    assert torch.equal(parameter != 0, masks[stacked].kept)
    assert ((parameter != 0).unflatten(2, (-1, 4)).sum(3) == 2).all()


def test_a_layer_named_as_routers_are_is_pruned_when_it_is_named():
    model = nn.ModuleDict({"gate": nn.Linear(8, 4), "up": nn.Linear(8, 4)})
    assert names(model) == ["up.weight"]
    assert names(model, targets=("gate",)) == ["gate.weight"]


@pytest.mark.parametrize(
    ("pattern", "pruned"),
    [
        ("layers.0", False),
        ("layers.*.mlp", False),
        ("layers.*", False),
        ("mlp", False),
        ("*_gate", True),
        ("layers.0.mlp.shared_expert_gate", True),
        ("layers.9.mlp.shared_expert_gate", False),
    ],
)
def test_a_router_is_pruned_by_its_own_name_alone(build, pattern, pruned):
    # Its one output makes a matrix of one row, which can be pruned like any other.
    found = names(build("qwen2_moe", num_hidden_layers=10), targets=("layers.0", pattern))
    assert ("model.layers.0.mlp.shared_expert_gate.weight" in found) == pruned


def test_a_stack_is_found_beside_a_layer_of_its_name_and_may_be_ignored(build):
    model = build("qwen2_moe")
    experts = {"down_proj": 2}
    stacks = [f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1)]
    found = find_targets(model, MagnitudeOptions(experts=experts))
    assert [target.name for target in found if target.parameter.ndim == 3] == stacks
    assert "model.layers.0.mlp.shared_expert.down_proj.weight" in [target.name for target in found]
    assert not set(stacks[:1]) & set(names(model, experts=experts, ignore=("layers.0",)))
    with pytest.raises(InputError, match=r"experts: `down_proj` fits only .*, which `ignore` names"):
        names(model, experts=experts, ignore=("experts",))
    with pytest.raises(
        InputError, match=r"experts: .*q_proj.weight has shape \[16, 16\], expected three axes"
    ):
        names(model, experts={"q_proj.weight": 2})


def test_stacks_that_nothing_names_are_told(build):
    model = build("mixtral")
    stacks = dense_stacks(model, MagnitudeOptions())
    assert len(stacks) == 4
    assert all(".experts." in name for name in stacks)
    assert dense_stacks(model, MagnitudeOptions(experts={"down_proj": 2}, ignore=("gate_up_proj",))) == []
    assert dense_stacks(nn.Sequential(nn.Conv1d(4, 4, 2)), MagnitudeOptions()) == []


def test_a_pattern_that_spares_nothing_or_only_what_is_spared_is_refused(build):
    model = build("llama")
    with pytest.raises(InputError, match="ignore: `q_porj` fits nothing in the model; did you mean `q_proj`"):
        names(model, ignore=("lm_head", "q_porj"))
    assert names(model, ignore=("embed_tokens", "k_proj", "lm_head"))
    for ignore in (("lm_head",), ()):
        with pytest.raises(InputError, match="targets: `lm_head` fits only lm_head, which stays dense"):
            names(model, targets=("q_proj", "lm_head"), ignore=ignore)
    with pytest.raises(InputError, match=r"targets: `q_proj` fits only .* what `ignore` names"):
        names(model, targets=("q_proj",), ignore=("self_attn",))


def test_patterns_fit_whole_parts_of_a_name():
    assert matches("model.layers.1.mlp.up_proj", ["layers.1"])
    assert not matches("model.layers.10.mlp.up_proj", ["layers.1"])
    assert matches("model.layers.10.mlp.up_proj", ["layers.*.mlp"])
    assert matches("model.layers.10.mlp.up_proj", ["*_proj"])
    assert not matches("model.layers.10.mlp.up_proj", ["up"])


def test_targets_and_ignore_choose(build):
    model = build("llama")
    assert len(names(model, targets=("q_proj", "layers.1.mlp"))) == 5
    assert not any("layers.0." in name for name in names(model, ignore=("layers.0",)))


def test_a_model_that_sees_is_pruned_in_its_text_decoder_unless_its_tower_is_named(build):
    model = build("gemma3")
    towers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "vis" in name
    ]
    assert towers
    by_default = names(model)
    assert by_default
    assert all("language_model.layers" in name for name in by_default)
    assert len(by_default) == 2 * 7
    named = names(model, targets=("vision_tower",))
    assert named
    assert all("vision_tower" in name for name in named)


def test_text_cannot_calibrate_what_reads_images(build, tokens):
    with pytest.raises(InputError, match=r"vision_tower.*got no inputs in calibration; .* by magnitude"):
        prune_(build("gemma3"), tokens, WandaOptions(targets=("vision_tower",)))


def test_a_shared_weight_is_one_target(mlp):
    mlp[2].weight = mlp[0].weight = nn.Parameter(torch.randn(8, 8))
    found = find_targets(mlp, MagnitudeOptions())
    assert [(target.name, len(target.modules)) for target in found] == [("0.weight", 2), ("4.weight", 1)]


def test_a_pattern_that_fits_nothing_lists_the_first_layers(build):
    model = build("llama")
    with pytest.raises(
        InputError, match=r"targets: `qproj` fits no layer; linear layers are model\.layers\.0\..* and 10"
    ):
        names(model, targets=("qproj",))
    with pytest.raises(InputError, match="nothing to prune: the model's linear layers are model"):
        names(model, ignore=("*",))
    with pytest.raises(InputError, match="experts: `down_proj_stack` fits no parameter"):
        names(model, experts={"down_proj_stack": 1})


def test_a_remainder_is_an_error_or_stays_dense():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    with pytest.raises(
        InputError, match=r"0\.weight: 6 inputs \(axis 1 of \[4, 6\]\) don't divide into groups of 4"
    ):
        names(model)
    assert names(model, remainder="dense") == ["1.weight"]


def test_adapters_quantised_and_missing_weights_are_refused_with_a_reason(build):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match=r"is PEFT's .* call merge_and_unload\(\) first"):
        MaskProPruner(adapted)
    quantised = nn.Sequential(nn.Linear(8, 8))
    quantised[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"0\.weight: is quantised"):
        names(quantised)
    with pytest.raises(InputError, match=r"0\.weight: has no memory yet"):
        names(nn.Sequential(nn.Linear(8, 8, device="meta")))


def test_sharded_weights_are_refused(build, shard):
    with pytest.raises(InputError, match=r"q_proj.weight: is sharded over processes; prune"):
        find_targets(shard(build("llama")), MagnitudeOptions())
