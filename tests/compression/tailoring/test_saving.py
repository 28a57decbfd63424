"""What models in memory bring along when they are written, what is refused, and what a failure leaves."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightsmith.checkpoints import Checkpoint, CheckpointWriter
from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import CheckpointError, InputError, SystemFault

from .made import TOKENS, family, logits, near
from .test_plan import blend, stored


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
