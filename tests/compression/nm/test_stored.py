"""Files that call their tensors otherwise than the loaded model does."""

import pytest
import torch

from weightsmith.checkpoints import Checkpoint, reader
from weightsmith.compression.nm import (
    MagnitudeOptions,
    SparseGPTOptions,
    WandaOptions,
    folders,
    freeze_mask_,
    prune_checkpoint,
    read_masks,
)
from weightsmith.errors import CheckpointError
from weightsmith.testbed import write_model_folder


@pytest.fixture
def saved(build, tmp_path):
    """`saved("gpt2", "base")` -> folder of a model, with a tokenizer, saved whole or as its base alone."""

    def make(kind, part="whole", **options):
        folder = write_model_folder("xs", tmp_path / "dense")
        model = build(kind, **options)
        (model.base_model if part == "base" else model).save_pretrained(folder)
        model.config.save_pretrained(folder)
        return folder

    return make


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def pruned_weights(folder):
    """The loaded model's pruned parameters with their masks, after a look at each group."""
    model, masks = load(folder), read_masks(folder)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask.kept), name
        assert ((weight != 0).unflatten(mask.dim, (-1, 4)).sum(mask.dim + 1) == 2).all()
    freeze_mask_(model, masks)
    return masks


@pytest.mark.parametrize(
    ("kind", "part", "options", "stored"),
    [
        ("gpt2", "base", {"vocab_size": 128}, "h.0.attn.c_attn.weight"),
        ("bloom", "base", {"vocab_size": 128}, "h.0.mlp.dense_4h_to_h.weight"),
        ("llama", "base", {"vocab_size": 128}, "layers.0.mlp.up_proj.weight"),
        ("gemma3", "whole", {}, "language_model.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_model_stored_under_another_prefix_is_pruned(saved, tmp_path, kind, part, options, stored):
    dense = saved(kind, part, **options)
    report = prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions())
    masks = pruned_weights(tmp_path / "out")
    assert report.layers.keys() == masks.keys()
    with Checkpoint.open(dense) as before, Checkpoint.open(tmp_path / "out") as after:
        assert stored in after.tensors
        assert stored not in masks
        assert before.tensors.keys() == after.tensors.keys()


def test_weights_that_moved_find_the_tensor_they_are_stored_in(saved, tmp_path):
    dense = saved("gpt2", "base", vocab_size=128)
    rows = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    prune_checkpoint(dense, tmp_path / "out", SparseGPTOptions(), [{"input_ids": rows, "labels": rows}])
    name = next(iter(pruned_weights(tmp_path / "out")))
    kept = read_masks(tmp_path / "out")[name].kept
    before, after = (load(folder).get_parameter(name)[kept] for folder in (dense, tmp_path / "out"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("kind", "part"), [("mixtral", "whole"), ("mixtral", "base"), ("qwen2_moe", "whole")]
)
def test_stacked_experts_are_pruned_in_the_tensors_of_each_expert(saved, tmp_path, kind, part):
    dense = saved(kind, part, vocab_size=128)
    experts = {"experts.gate_up_proj": 2, "experts.down_proj": 2}
    with pytest.warns(UserWarning, match=r"stay dense: model\.layers\.0\.mlp\.experts\..* `experts` prunes"):
        prune_checkpoint(dense, tmp_path / "all", MagnitudeOptions())
    report = prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(experts=experts))
    stacks = [name for name, mask in pruned_weights(tmp_path / "out").items() if mask.kept.ndim == 3]
    assert len(stacks) == 4
    for name in stacks:
        assert 0.5 < report.layers[name]["kept_norm"] < 1
    with Checkpoint.open(dense) as before, Checkpoint.open(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()


def test_a_model_whose_tensors_fit_no_mask_is_refused_before_any_work(saved, tmp_path, monkeypatch):
    dense = saved("gpt2", vocab_size=128)
    monkeypatch.setattr(folders, "prune_", lambda *args, **kwargs: pytest.fail("the work has begun"))
    monkeypatch.setattr(reader, "_quantized", lambda config, tensors: "tensor `w` holds packed weights")
    with pytest.raises(CheckpointError, match="holds packed weights; prune the model before"):
        prune_checkpoint(dense, tmp_path / "out", WandaOptions())
