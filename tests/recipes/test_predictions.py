"""What a dry run says of merges, against what then happens, on a model that takes seconds to merge."""

from __future__ import annotations

import json

import numpy as np
import pytest

from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
from weightsmith.recipes import Processes, run_recipe
from weightsmith.testbed import model_files, parameter_shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of 28 million parameters and three changes of it."""
    folder = tmp_path_factory.mktemp("models")
    files = {name: text.encode() for name, text in model_files("m").items()}
    shapes = parameter_shapes(json.loads(files["config.json"]))
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    for number, name in enumerate(("base", "one", "two", "three")):
        same, own = np.random.default_rng(0), np.random.default_rng(number)
        with CheckpointWriter(folder / name, specs, side_files=files, lineage=Lineage("test")) as writer:
            for spec in specs:
                values = same.standard_normal(spec.numel, np.float32)
                writer.write(spec.name, values + 0.1 * own.standard_normal(spec.numel, np.float32))
            writer.commit()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "tsvm", "resm"])
def test_a_merge_takes_the_predicted_disk_memory_and_time(models, tmp_path, method):
    page = tmp_path / "page.yaml"
    base = "" if method == "linear" else f"base: {models}/base, "
    three = ", ".join(f"{models}/{name}" for name in ("one", "two", "three"))
    page.write_text(f"stages: {{merged: {{merge: {{method: {method}, {base}models: [{three}]}}}}}}")
    result = run_recipe(page, root=tmp_path / "runs", executor=Processes(1))
    stage = result.folder / "stages" / "merged"
    record = json.loads((stage / "stage.json").read_text())
    predicted = record["predicted"]
    assert sum(file.stat().st_size for file in (stage / "checkpoint").iterdir()) == predicted["disk_bytes"]
    assert record["peak_bytes"] / 1.3 <= predicted["memory_bytes"] <= record["peak_bytes"] * 1.3
    assert record["seconds"] / 2 <= predicted["seconds"] <= record["seconds"] * 2
