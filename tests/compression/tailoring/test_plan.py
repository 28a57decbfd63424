"""Plans: files that come back, checkpoints that anything loads, pages and plans of others."""

import copy
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import CheckpointError, InputError

from .made import KINDS, TOKENS, family, ids, llama, logits, near

PEER = Path(__file__).parents[3] / ".venv-peers" / "bin" / "python"


def tokenizer_of(folder):
    """A vocabulary of as many words as the models have rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(TOKENS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1").save_pretrained(folder)


def stored(tmp_path, kind="llama", dtype=None, models=None):
    """A family in folders."""
    base, candidates = models or family(kind)
    folders = []
    for name, model in zip(("base", "one", "two"), (base, *candidates), strict=True):
        folder = tmp_path / name
        (model.to(dtype) if dtype else model).save_pretrained(folder)
        tokenizer_of(folder)
        folders.append(folder)
    return folders


def blend(depth):
    return Configuration.of(depth, [1], {0: [1], 2: [1, 2], depth - 1: [2]}, {2: 0.3})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", ["follow", "base", "mean"])
def test_the_written_checkpoint_is_the_built_model_bit_for_bit(tmp_path, kind, edge):
    base, *candidates = stored(tmp_path, kind)
    depth = {"llama": 4, "gpt2": 4, "gemma": 6}[kind]
    plan = TailorPlan.of(blend(depth), base, candidates, edge=edge)
    out = plan.save_pretrained(tmp_path / "out")
    loaded, built = AutoModelForCausalLM.from_pretrained(out), plan.build()
    ours, theirs = built.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert torch.equal(logits(loaded), logits(built))
    assert loaded.config.num_hidden_layers == depth - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_model_generates_with_a_cache_what_it_does_without(tmp_path, kind):
    base, *candidates = stored(tmp_path, kind)
    depth = {"llama": 4, "gpt2": 4, "gemma": 6}[kind]
    model = AutoModelForCausalLM.from_pretrained(
        TailorPlan.of(blend(depth), base, candidates).save_pretrained(tmp_path / "out")
    )
    found = model.generate(ids(1, 9), max_new_tokens=8, do_sample=False)
    expected = ids(1, 9)
    while expected.shape[1] < found.shape[1]:
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


def test_bfloat16_is_blended_in_float32_and_may_be_written_as_another_type(tmp_path):
    base, *candidates = stored(tmp_path, dtype=torch.bfloat16)
    plan = TailorPlan.of(blend(4), base, candidates)
    with Checkpoint.open(plan.save_pretrained(tmp_path / "low")) as low:
        assert {info.dtype for info in low.tensors.values()} == {"BF16"}
        with Checkpoint.open(plan.save_pretrained(tmp_path / "high", dtype="float32")) as high:
            name = "model.layers.1.mlp.up_proj.weight"
            exact = torch.from_numpy(high.read(name)).to(torch.bfloat16).float().numpy()
            np.testing.assert_array_equal(low.read(name), exact)
            assert high.config["dtype"] == "float32"


def test_a_folder_carries_its_tokenizer_and_its_family_tree(tmp_path):
    base, *candidates = stored(tmp_path)
    out = TailorPlan.of(blend(4), base, candidates).save_pretrained(tmp_path / "out")
    with Checkpoint.open(out) as made:
        lineage = made.lineage
        assert "tokenizer.json" in made.side_file_map()
    assert lineage.method == "gptailor"
    assert [(parent.role, parent.name) for parent in lineage.inputs] == [
        ("base", "base"), ("model", "one"), ("model", "two")
    ]  # fmt: skip
    assert Configuration.from_json(lineage.parameters["configuration"]) == blend(4)
    with pytest.raises(CheckpointError, match="exists"):
        TailorPlan.of(blend(4), base, candidates).save_pretrained(out)


def test_models_in_memory_can_be_written_too(tmp_path):
    base, candidates = family()
    plan = TailorPlan.of(blend(4), base, candidates)
    loaded = AutoModelForCausalLM.from_pretrained(plan.save_pretrained(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(plan.build()))
    with Checkpoint.open(tmp_path / "out") as made:
        assert made.lineage.method == "gptailor"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tied_model_is_written_once_and_follows_the_first_layer(tmp_path):
    base = llama(tied=True)
    candidates = [near(base, 1), near(base, 2)]
    folders = stored(tmp_path, models=(base, candidates))
    plan = TailorPlan.of(Configuration.of(4, [1], {0: [2]}), folders[0], folders[1:])
    with Checkpoint.open(plan.save_pretrained(tmp_path / "out")) as made:
        assert "lm_head.weight" not in made.tensors
        found = made.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found, candidates[1].model.embed_tokens.weight.detach().numpy().ravel())


def test_a_plan_comes_back_from_its_file(tmp_path):
    base, *candidates = stored(tmp_path)
    plan = TailorPlan.of(blend(4), base, candidates)
    plan.save(tmp_path / "plan.json")
    again = TailorPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert torch.equal(logits(again.build()), logits(plan.build()))


def test_a_plan_of_other_weights_is_refused(tmp_path):
    base, *candidates = stored(tmp_path)
    plan = TailorPlan.of(blend(4), base, candidates)
    near(family()[0], 9).save_pretrained(candidates[0])
    with pytest.raises(CheckpointError, match="one: its content is not that"):
        plan.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 9}, "not a plan of GPTailor"),
        ({"configuration": {}}, "not a configuration"),
        ({"models": [{"name": "base"}]}, "not a plan"),
        ({"models": [{"name": "base", "path": None, "fingerprint": ""}]}, "there are 0 candidates"),
        ({"edge": "left"}, "edge 'left'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, change, words):
    base, candidates = family()
    value = TailorPlan.of(blend(4), base, candidates).to_json()
    (tmp_path / "plan.json").write_text(json.dumps(value | change))
    with pytest.raises(InputError, match=words):
        TailorPlan.load(tmp_path / "plan.json")


def test_a_plan_of_models_in_memory_needs_them_again():
    base, candidates = family()
    plan = TailorPlan.of(blend(4), base, candidates)
    alone = TailorPlan.from_json(plan.to_json())
    with pytest.raises(InputError, match="give them again"):
        alone.build()
    again = TailorPlan.from_json(plan.to_json(), sources=(base, *candidates))
    assert torch.equal(logits(again.build()), logits(plan.build()))
    with pytest.raises(InputError, match="is of 3 models, 1 were given"):
        TailorPlan.from_json(plan.to_json(), sources=(base,))


def published(**more):
    plan = {"remove_idx_0": 2, "remove_idx_1": 1, "layer_0_candidate_0": 1, "layer_0_candidate_1": 0}
    plan |= {
        "layer_3_candidate_0": 1,
        "layer_3_candidate_1": 1,
        "layer_3_merge_scale_factor": 0.4804792551755,
    }
    return plan | {"layer_0_merge_scale_factor": 0.7, "layer_3_output_scale": 1.3} | more


def test_a_published_plan_is_read_with_the_base_where_its_code_takes_it():
    base, candidates = family()
    plan = TailorPlan.from_auto_merge_llm(published(), base, candidates)
    assert plan.configuration.dropped == (1, 2)
    assert plan.configuration.layers[0].sources == (1,)
    assert plan.configuration.layers[1].weight == 0.4804792551755
    model = plan.build()
    name = "mlp.down_proj.weight"
    start = base.model.layers[1].get_parameter(name)  # layer 3 stands in place 1
    deltas = sum(candidate.model.layers[3].get_parameter(name) - start for candidate in candidates)
    torch.testing.assert_close(
        model.model.layers[1].get_parameter(name), start + 0.4804792551755 * deltas, rtol=1e-6, atol=1e-7
    )
    own = TailorPlan.from_auto_merge_llm(published(), base, candidates, compat="own").build()
    assert not torch.allclose(
        own.model.layers[1].get_parameter(name), model.model.layers[1].get_parameter(name)
    )


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"what": 1}, "what = 1"),
        ({"remove_idx_0": 1}, "names no layer"),
        ({"layer_0_candidate_0": 1, "layer_2_candidate_0": 1}, "layer 1 is neither removed nor described"),
        ({"layer_0_candidate_2": 1}, "there are 2"),
    ],
)
def test_what_is_no_published_plan_is_refused(plan, words):
    base, candidates = family()
    with pytest.raises(InputError, match=words):
        TailorPlan.from_auto_merge_llm(plan, base, candidates)


def test_the_base_of_a_shifted_blend_is_written_from_folders_as_it_is_built(tmp_path):
    base, *candidates = stored(tmp_path)
    plan = TailorPlan.from_auto_merge_llm(published(), base, candidates)
    loaded = AutoModelForCausalLM.from_pretrained(plan.save_pretrained(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(plan.build()))


def test_a_page_for_mergekit_names_all_models_in_every_slice(tmp_path):
    base, *candidates = stored(tmp_path)
    page = YAML(typ="safe").load(TailorPlan.of(blend(4), base, candidates).to_mergekit_yaml())
    assert page["merge_method"] == "task_arithmetic"
    assert page["parameters"] == {"normalize": False}
    spans = [piece["sources"][0]["layer_range"] for piece in page["slices"]]
    assert spans == [[0, 1], [2, 3], [3, 4]]
    weights = [
        [source["parameters"]["weight"] for source in piece["sources"][1:]] for piece in page["slices"]
    ]
    assert weights == [[1.0, 0.0], [0.3, 0.3], [0.0, 1.0]]
    alone = YAML(typ="safe").load(TailorPlan.of(Configuration.of(4, [1]), base).to_mergekit_yaml())
    assert alone["merge_method"] == "passthrough"


def test_what_mergekit_has_no_page_for_is_refused(tmp_path):
    base, candidates = family()
    with pytest.raises(InputError, match="in memory"):
        TailorPlan.of(blend(4), base, candidates).to_mergekit_yaml()
    folders = stored(tmp_path)
    with pytest.raises(InputError, match="compat repo"):
        TailorPlan.of(blend(4), folders[0], folders[1:], compat="repo").to_mergekit_yaml()


RUN_PAGES = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, page in json.load(open(sys.argv[1])).items():
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(page)), f"{sys.argv[2]}/{name}", options)
"""


@pytest.mark.skipif(not PEER.exists(), reason="mergekit is not installed in .venv-peers")
def test_mergekit_makes_the_same_tensors_of_the_page(tmp_path):
    base, *candidates = stored(tmp_path)
    plans = {
        edge: TailorPlan.of(blend(4), base, candidates, edge=edge) for edge in ("follow", "base", "mean")
    }
    plans["alone"] = TailorPlan.of(Configuration.of(4, [1, 2]), base)
    pages = {name: plan.to_mergekit_yaml("float32") for name, plan in plans.items()}
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    command = [str(PEER), "-c", RUN_PAGES, str(tmp_path / "pages.json"), str(tmp_path / "peer")]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    for name, plan in plans.items():
        with (
            Checkpoint.open(plan.save_pretrained(tmp_path / "ours" / name)) as ours,
            Checkpoint.open(tmp_path / "peer" / name) as theirs,
        ):
            assert ours.tensors.keys() == theirs.tensors.keys()
            for tensor in ours.tensors:
                np.testing.assert_allclose(ours.read(tensor), theirs.read(tensor), rtol=1e-6, atol=1e-6)


def test_the_share_of_layers_is_not_that_of_parameters():
    base, candidates = family()
    plan = TailorPlan.of(Configuration.of(4, [1]), base, candidates)
    pool = LayerPool(base, candidates)
    assert plan.dropped_share == 0.25
    assert pool.num_parameters(plan.configuration) == plan.build().num_parameters()
    assert pool.num_parameters(Configuration.of(4)) == copy.deepcopy(base).num_parameters()
