"""What is pruned as names tell it: a forecast from a checkpoint's headers counts what the work will prune."""

import math

import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.stacks import text_layers
from weightsmith.compression.nm import MagnitudeOptions
from weightsmith.compression.nm.names import stored_matrices
from weightsmith.compression.nm.targets import find_targets

LAYERS = [f"model.language_model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")]
KINDS = ("llama", "gpt2", "opt", "gemma2", "gpt_neox", "mixtral", "qwen2_moe", "bloom", "gemma3")
EXPERTS = {"gate_up_proj": 2, "down_proj": 2}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"experts": EXPERTS}) for kind in ("mixtral", "qwen2_moe")),
        ("mixtral", {"experts": {"mlp.experts.down_proj": 2}}),
        ("mixtral", {"experts": EXPERTS, "ignore": ("lm_head", "layers.1")}),
        ("llama", {"targets": ("mlp",), "ignore": ("layers.0",)}),
        ("qwen2_moe", {"targets": ("self_attn",)}),
        ("gemma3", {"targets": ("vision_tower", "layers.1")}),
        ("llama", {"pattern": "4:16", "remainder": "dense"}),
    ],
)
def test_the_forecast_counts_what_the_work_prunes(build, tmp_path, kind, options):
    model = build(kind)
    model.save_pretrained(tmp_path)
    chosen = MagnitudeOptions(**options)
    with Checkpoint.open(tmp_path) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = stored_matrices(shapes, chosen)
    targets = find_targets(model, chosen)
    assert sum(map(math.prod, found)) == sum(target.parameter.numel() for target in targets)
    flat = sorted(tuple(target.shape) for target in targets if len(target.shape) == 2)
    assert flat == sorted(found) or any(len(target.shape) == 3 for target in targets)
    assert found


@pytest.mark.parametrize(
    "beside",
    [
        ["model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.multi_modal_projector.linear_1"],
        ["model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"],
        ["model.audio_tower.conformer.0.attention.q_proj"],
    ],
)
def test_what_stands_beside_a_text_decoder_is_none_of_its_layers(beside):
    assert text_layers([*beside, *LAYERS, "lm_head"]) == LAYERS


@pytest.mark.parametrize(
    "names",
    [
        ["0", "2"],
        ["bert.encoder.layer.0.output.dense", "head"],
        [*LAYERS, "score"],
        ["model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.q_proj", "project_out"],
    ],
)
def test_a_model_with_one_stack_is_taken_whole(names):
    assert text_layers(names) == names
