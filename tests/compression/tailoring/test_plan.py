"""Plans: files that come back, checkpoints that anything loads, pages and plans of others."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from weightsmith.checkpoints import Checkpoint, CheckpointWriter
from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import CheckpointError, InputError, SystemFault

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


def loaded(folder, *, trained=False):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if trained:
        with torch.no_grad():
            model.get_parameter("model.norm.weight").add_(1)
    return model


@pytest.mark.parametrize("mixed", [False, True], ids=["all loaded", "base a folder"])
def test_models_in_memory_bring_what_their_folders_have(tmp_path, mixed, caplog):
    base, *candidates = stored(tmp_path)
    plan = TailorPlan.of(blend(4), base if mixed else loaded(base), [loaded(one) for one in candidates])
    plan.save_pretrained(tmp_path / "out")
    assert "written without" not in caplog.text
    with Checkpoint.open(tmp_path / "out") as made, Checkpoint.open(candidates[0]) as one:
        assert made.side_file_map()["tokenizer.json"].read_text() == (base / "tokenizer.json").read_text()
        assert [(parent.role, parent.name) for parent in made.lineage.inputs] == [
            ("base", "base"), ("model", "one"), ("model", "two")
        ]  # fmt: skip
        assert made.lineage.inputs[1].fingerprint == one.fingerprint()
        assert made.config["num_hidden_layers"] == 3


def test_a_family_tree_names_no_folder_that_a_model_has_left_behind(tmp_path, caplog):
    base, one, two = stored(tmp_path)
    plan = TailorPlan.of(blend(4), loaded(base), [loaded(one, trained=True), loaded(two)])
    plan.save_pretrained(tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as made:
        assert [parent.name for parent in made.lineage.inputs] == ["base", "two"]
    assert "out: written without the ancestors candidate 1: loaded models whose folder" in caplog.text


def test_what_is_not_known_of_models_in_memory_is_said_in_one_line(tmp_path, caplog):
    base, candidates = family()
    TailorPlan.of(blend(4), base, candidates).save_pretrained(tmp_path / "out")
    (line,) = [record.getMessage() for record in caplog.records if "written without" in record.getMessage()]
    assert "without a tokenizer and without the ancestors base, candidate 1, candidate 2" in line


def test_folders_beside_models_in_memory_must_be_those_of_the_plan(tmp_path):
    base, one, two = stored(tmp_path)
    plan = TailorPlan.of(blend(4), base, [loaded(one), two])
    near(family()[0], 9).save_pretrained(two)
    with pytest.raises(CheckpointError, match="two: its content is not that"):
        plan.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


@pytest.mark.parametrize("dtype", ["int8", "float33", torch.int8, "Tensor"])
def test_a_type_that_weights_cannot_have_is_refused(tmp_path, dtype):
    base, candidates = family()
    plan = TailorPlan.of(blend(4), base, candidates)
    with pytest.raises(InputError, match=rf"dtype `{dtype}` is not one of float32, bfloat16"):
        plan.build(dtype)
    if isinstance(dtype, str):
        with pytest.raises(InputError, match="is not one of float32, bfloat16"):
            plan.save_pretrained(tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    assert plan.build(torch.bfloat16).dtype == plan.build("bf16").dtype == torch.bfloat16


def mixture():
    """Layers 0 and 2 are dense."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_experts=4,
        shared_expert_intermediate_size=8, num_experts_per_tok=2, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, decoder_sparse_step=2, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def test_a_shifted_base_of_another_kind_of_layer_is_refused_by_name(tmp_path):
    base = mixture()
    candidates = [near(base, 1), near(base, 2)]
    configuration = Configuration.of(4, [0], {1: [1, 2], 3: [1, 2]}, {1: 0.6, 3: 0.6})
    words = r"layer 1: compat repo takes the base of its blend from layer 0, where `mlp\..*` is (missing|\[)"
    with pytest.raises(InputError, match=words):
        TailorPlan.of(configuration, base, candidates, compat="repo").build()
    with pytest.raises(InputError, match=words):
        LayerPool(base, candidates, compat="repo").assemble(configuration)
    folders = stored(tmp_path, models=(base, candidates))
    words = r"base: compat repo takes the base of `model\.layers\.1\.mlp\..*` from `model\.layers\.0\.mlp"
    with pytest.raises(CheckpointError, match=words):
        TailorPlan.of(configuration, folders[0], folders[1:], compat="repo").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Among layers of one kind the shift is what it was.
    alike = Configuration.of(4, [0, 1], {2: [1, 2]}, {2: 0.6})
    assert logits(TailorPlan.of(alike, base, candidates, compat="repo").build()).isfinite().all()


@pytest.mark.parametrize("live", [False, True], ids=["folders", "loaded"])
def test_a_save_that_fails_leaves_nothing_and_harms_nothing(tmp_path, live, monkeypatch):
    base, *candidates = stored(tmp_path)
    base, candidates = (loaded(base), [loaded(one) for one in candidates]) if live else (base, candidates)
    plan, before = TailorPlan.of(blend(4), base, candidates), sorted(os.listdir(tmp_path))
    out = tmp_path / "place" / "out"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.save_pretrained(out)
    assert list(out.parent.iterdir()) == []

    out.mkdir()
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(TailorPlan, "build", lambda *_: pytest.fail("was built, though `out` can't be made"))
    with pytest.raises(CheckpointError, match="exists already"):
        plan.save_pretrained(out)
    with pytest.raises(CheckpointError, match="holds files but no checkpoint"):
        plan.save_pretrained(out, overwrite=True)
    with pytest.raises(SystemFault, match=r"notes\.txt"):
        plan.save_pretrained(out / "notes.txt" / "below")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "place"])


KILLED = """
import os, sys
import transformers
from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring.space import Configuration
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
save = transformers.PreTrainedModel.save_pretrained
def killed(*given, **options):
    save(*given, **options)
    os._exit(9)
transformers.PreTrainedModel.save_pretrained = killed
TailorPlan.of(Configuration.of(4, [1]), model).save_pretrained(sys.argv[2])
"""


def test_what_a_killed_save_of_loaded_models_leaves_is_tidied_by_the_next(tmp_path):
    folder, *_ = stored(tmp_path / "models")
    out = tmp_path / "here" / "out"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(out)], capture_output=True, timeout=250
    )
    assert ended.returncode == 9, ended.stderr
    assert [path.name for path in out.parent.iterdir()] != ["out"]
    TailorPlan.of(Configuration.of(4, [1]), loaded(folder)).save_pretrained(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


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
