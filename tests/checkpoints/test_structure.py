"""Summaries: counts from headers, norms and spectra from weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightsmith.checkpoints import Checkpoint, summarise


def test_counts_blocks_dtypes_and_sizes(write_model, tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(
        np.float16
    )
    tensors["model.layers.10.steps"] = np.arange(3)
    folder = write_model("m", tensors, shards=2)
    summary = summarise(folder)
    total = sum(values.size for values in tensors.values())
    assert (summary.architecture, summary.model_type) == ("LlamaForCausalLM", "llama")
    assert (summary.parameters, summary.trainable) == (total, total - 3)
    assert summary.dtypes == {"F16": 192, "F32": total - 195, "I64": 3}
    assert [(b.name, b.layer, b.tensors, b.parameters, b.dtypes) for b in summary.blocks] == [
        ("lm_head", None, 1, 128, ("F32",)),
        ("model.embed_tokens", None, 1, 128, ("F32",)),
        ("model.layers.0", 0, 2, 256, ("F32",)),
        ("model.layers.1", 1, 2, 256, ("F16", "F32")),
        ("model.layers.10", 10, 1, 3, ("I64",)),
        ("model.norm", None, 1, 8, ("F32",)),
    ]
    assert sum(block.nbytes for block in summary.blocks) == sum(values.nbytes for values in tensors.values())
    assert list(summary.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert summary.weight_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert summary.disk_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert summary.method is None
    assert json.loads(json.dumps(summary.to_json()))["blocks"][0]["name"] == "lm_head"


def test_norms_are_those_of_float64_and_of_blocks_together(write_model, tensors):
    summary = summarise(write_model("m", tensors), norms=True)
    for name, values in tensors.items():
        exact = values.astype(np.float64)
        norms = summary.norms[name]
        assert norms.norm == pytest.approx(np.linalg.norm(exact), rel=1e-12)
        assert norms.rms == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-12)
        assert norms.largest == np.abs(exact).max()
    layer = np.concatenate([values.ravel() for name, values in tensors.items() if ".layers.1." in name])
    block = next(block for block in summary.blocks if block.layer == 1)
    assert block.norms.norm == pytest.approx(np.linalg.norm(layer.astype(np.float64)), rel=1e-12)


def test_nan_and_infinities_are_counted_and_left_out(tmp_path):
    values = np.array([3, np.nan, -4, np.inf, -np.inf, 0], np.float32)
    save_file({"a.weight": values, "b.weight": np.full(2, 3e30, np.float32)}, tmp_path / "model.safetensors")
    norms = summarise(tmp_path, norms=True).norms
    assert (norms["a.weight"].norm, norms["a.weight"].largest, norms["a.weight"].not_finite) == (5, 4, 3)
    assert norms["b.weight"].norm == pytest.approx(3e30 * 2**0.5, rel=1e-6)  # squares past float32


def test_spectra_are_those_of_each_matrix(write_model, rng):
    left, _ = np.linalg.qr(rng.standard_normal((40, 20)))
    right, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    singular = np.linspace(5, 1, 20)
    matrix = (left * singular @ right).astype(np.float32)
    broken = np.full((3, 3), np.nan, np.float32)
    tensors = {
        "w": matrix,
        "bias": np.ones(4, np.float32),
        "zero": np.zeros((3, 3), np.float32),
        "nan": broken,
    }
    spectra = summarise(write_model("m", tensors), spectra=True).spectra
    assert set(spectra) == {"w", "zero", "nan"}
    np.testing.assert_allclose(spectra["w"].top, singular[:8], rtol=1e-4)
    assert spectra["w"].stable_rank == pytest.approx((singular**2).sum() / 25, rel=1e-4)
    assert spectra["zero"].stable_rank == 0
    assert spectra["nan"].top == ()


def test_progress_adds_up_to_what_was_announced(write_model, tensors):
    class Bar:
        def __init__(self):
            self.total, self.seen, self.ended = 0, 0, False

        def start(self, label, total, unit):
            self.total = total

        def advance(self, amount):
            self.seen += amount

        def done(self):
            self.ended = True

    bar = Bar()
    summarise(write_model("m", tensors), norms=True, progress=bar)
    assert bar.ended
    assert bar.seen == bar.total == sum(values.size for values in tensors.values())


def test_an_open_checkpoint_stays_open(write_model, tensors):
    with Checkpoint.open(write_model("m", tensors)) as checkpoint:
        summarise(checkpoint, norms=True)
        checkpoint.read("model.norm.weight")


def test_an_adapters_own_parameters_are_the_trainable_ones(write_model, tensors, tmp_path):
    base = write_model("base", tensors)
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.ones((24, 2), np.float32)}
    save_file(
        {f"{module}.{side}.weight": values for side, values in factors.items()},
        folder / "adapter_model.safetensors",
    )
    summary = summarise(folder, norms=True)
    assert (summary.trainable, summary.parameters) == (64, sum(values.size for values in tensors.values()))
    changed = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.float64) + 2
    norm = summary.norms["model.layers.0.mlp.up_proj.weight"].norm
    assert norm == pytest.approx(np.linalg.norm(changed), rel=1e-6)


def test_reading_tracing_and_summaries_import_no_torch_and_no_transformers(write_model, tensors):
    folder = write_model("m", tensors)
    code = (
        "import sys; import weightsmith.checkpoints as c; assert 'numpy' not in sys.modules; "
        f"c.summarise({str(folder)!r}, norms=True); c.trace({str(folder)!r}, verify=True); "
        "c.CheckpointWriter; heavy = {'torch', 'transformers', 'huggingface_hub', 'pydantic'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
