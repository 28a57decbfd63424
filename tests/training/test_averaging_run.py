"""The mean of checkpoint folders as a folder: the sum, what is carried over, what is refused, no torch."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging import average
from weightsmith.training import SeWAOptions, average_run
from weightsmith.training.averaging import streaming

SHAPES = {"a.weight": (5, 7), "b.bias": (300_001,), "scalar": ()}


def folder(path, seed, dtype="F32", shapes=SHAPES, broken=None, config=None, count=None):
    rng = np.random.default_rng(seed)
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    specs.append(TensorSpec("count", "I64", (1,)))
    files = {"config.json": json.dumps(config or {"model_type": "x"}).encode()}
    with CheckpointWriter(path, specs, side_files=files, lineage=Lineage("test")) as writer:
        for name, shape in shapes.items():
            values = rng.standard_normal(math.prod(shape)).astype(np.float32)
            if name == broken:
                values[-1] = np.nan
            writer.write(name, values)
        writer.write("count", np.array([seed if count is None else count]))
        return writer.commit()


def folders(tmp_path, number, **options):
    return [folder(tmp_path / f"checkpoint-{10 * (seed + 1)}", seed, **options) for seed in range(number)]


def values(path):
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_the_mean_is_the_sum_in_float32_divided_once(tmp_path):
    states = folders(tmp_path, 3)
    average_run(states, tmp_path / "out", method="uniform")
    read = [values(state) for state in states]
    for name, mean in values(tmp_path / "out").items():
        if name != "count":
            expected = (read[0][name] + read[1][name] + read[2][name]) / np.float32(3)
            np.testing.assert_array_equal(mean, expected)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5), (1.0, 2.0, 3.0)])
def test_the_same_bits_as_a_linear_merge(tmp_path, weights, dtype):
    states = folders(tmp_path, 3, dtype=dtype, count=7)
    with Checkpoint.open(states[0]) as a, Checkpoint.open(states[1]) as b, Checkpoint.open(states[2]) as c:
        streaming.write_average([a, b, c], tmp_path / "ours", weights or (1.0, 1.0, 1.0))
    average([str(state) for state in states], tmp_path / "merged", weights=weights)
    ours, merged = values(tmp_path / "ours"), values(tmp_path / "merged")
    for name in SHAPES:
        np.testing.assert_array_equal(ours[name], merged[name])


@pytest.mark.parametrize("tile", [1000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_and_threads_change_nothing(tmp_path, monkeypatch, tile, threads):
    states = folders(tmp_path, 2, dtype="BF16")
    average_run(states, tmp_path / "plain", method="uniform")
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", tile)
    average_run(states, tmp_path / "out", method="uniform", threads=threads)
    for name, mean in values(tmp_path / "out").items():
        np.testing.assert_array_equal(mean, values(tmp_path / "plain")[name])


def test_the_folder_carries_the_latest_states_files_and_its_lineage(tmp_path):
    states = folders(tmp_path, 4)
    report = average_run(list(reversed(states)), tmp_path / "out", method="lawa", num_select=2)
    assert report.selection.chosen_steps == (30, 40)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}
    assert values(tmp_path / "out")["count"].tolist() == [3]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        lineage = checkpoint.lineage
    assert lineage.method == "average"
    assert lineage.parameters == {"method": "lawa", "steps": [30, 40], "weights": [0.5, 0.5]}
    assert [ancestor.name for ancestor in lineage.inputs] == ["checkpoint-30", "checkpoint-40"]
    record = json.loads((tmp_path / "out" / "weightsmith" / "selection.json").read_text())
    assert record["chosen_steps"] == [30, 40]


def test_the_same_candidates_give_the_same_bytes(tmp_path):
    states = folders(tmp_path, 3)
    for name in ("one", "two"):
        average_run(states, tmp_path / name, method="random", num_select=2, seed=3)
    files = sorted(
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()
    )
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_output_dtype_can_be_chosen(tmp_path):
    average_run(folders(tmp_path, 2), tmp_path / "out", method="uniform", dtype="BF16")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16", "I64"}


def test_a_broken_candidate_is_named_and_nothing_is_written(tmp_path):
    states = folders(tmp_path, 2)
    states.append(folder(tmp_path / "checkpoint-30", 9, broken="b.bias"))
    with pytest.raises(CheckpointError, match=r"checkpoint-30: b.bias holds NaN or infinity"):
        average_run(states, tmp_path / "out", method="uniform")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
    ]


def test_states_of_different_models_are_refused(tmp_path):
    states = folders(tmp_path, 1)
    other = folder(tmp_path / "checkpoint-20", 1, config={"model_type": "y"})
    with pytest.raises(CheckpointError, match="checkpoint-10 is a `x`, checkpoint-20 a `y`"):
        average_run([*states, other], tmp_path / "out", method="uniform")


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    states = folders(tmp_path, 2)
    average_run(states, tmp_path / "out", method="uniform")
    with pytest.raises(CheckpointError):
        average_run(states, tmp_path / "out", method="lawa", num_select=1)
    average_run(states, tmp_path / "out", method="lawa", num_select=1, overwrite=True)
    np.testing.assert_array_equal(values(tmp_path / "out")["scalar"], values(states[1])["scalar"])


def test_rules_need_no_torch(tmp_path):
    states = [str(state) for state in folders(tmp_path, 2)]
    program = (
        "import sys; from weightsmith.training import average_run; "
        f"average_run({states!r}, {str(tmp_path / 'out')!r}, method='uniform'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def llamas(tmp_path, number=4, bad=()):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    paths = []
    for step in range(number):
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 1.0 if step in bad else 0.01
                parameter.add_(scale * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        paths.append(tmp_path / f"checkpoint-{step}")
    ids = torch.randint(0, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    return paths, [{"input_ids": ids, "labels": ids}]


@pytest.mark.parametrize("in_memory", [False, True])
def test_sewa_reads_folders_and_the_mean_loads_with_transformers(tmp_path, in_memory):
    paths, batches = llamas(tmp_path, 4, bad=(3,))
    report = average_run(
        paths,
        tmp_path / "out",
        method="sewa",
        num_select=2,
        batches=batches,
        sewa=SeWAOptions(steps=40),
        in_memory=in_memory,
    )
    assert 3 not in report.selection.chosen_steps
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    chosen = [load_file(paths[step] / "model.safetensors") for step in report.selection.chosen_steps]
    for name in chosen[0]:
        np.testing.assert_allclose(mean[name].numpy(), (chosen[0][name] + chosen[1][name]) / 2, rtol=1e-6)


def test_a_learned_choice_without_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="greedy measures losses: give `batches`"):
        average_run(folders(tmp_path, 2), tmp_path / "out", method="greedy")
