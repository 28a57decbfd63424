"""Folders of statistics: measured against brute force, and refused where they don't fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.cli.main import app
from weightsmith.errors import CheckpointError, InputError, PageError
from weightsmith.evaluation import load_model
from weightsmith.merging import measure, measuring, merge, plan_merge
from weightsmith.testbed import model_config, model_files, parameter_shapes

from .made import read, weight_bytes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny Llamas."""
    root = tmp_path_factory.mktemp("measured")
    shapes = parameter_shapes(model_config("xs"))
    files = {name: content.encode() for name, content in model_files("xs").items()}
    specs = [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
    for index, name in enumerate(("one", "two")):
        rng = np.random.default_rng(index)
        with CheckpointWriter(root / name, specs, side_files=files, lineage=Lineage("example")) as writer:
            for tensor, shape in shapes.items():
                writer.write(tensor, (0.1 * rng.standard_normal(shape)).astype(np.float32).reshape(-1))
            writer.commit()
    return root


def batches(count=3, length=12):
    """Token ids with the second half as labels; the last example ends in padding."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        ids = torch.from_numpy(rng.integers(1, 60, (1, length)))
        labels = ids.clone()
        labels[:, : length // 2] = -100
        if index == count - 1:
            labels[:, -2:] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.fixture(scope="module")
def measured(models):
    for name in ("one", "two"):
        measure(models / name, batches(), models / f"stats-{name}")
    return models


def test_fisher_information_is_the_square_of_each_examples_gradient(measured):
    model, _ = load_model(measured / "one", device="cpu")
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    tokens = 0
    for batch in batches():
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        loss = 0.0
        for place in range(1, batch["labels"].shape[1]):
            wanted = int(batch["labels"][0, place])
            if wanted != -100:
                loss = loss + logits[0, place - 1, wanted]
                tokens += 1
        loss.backward()
        for name, value in model.named_parameters():
            squares[name] += value.grad**2
    found = read(measured / "stats-one")
    assert {name for name in found if name.startswith("fisher.")} == {f"fisher.{name}" for name in squares}
    for name, value in squares.items():
        wanted = (value / tokens).numpy()
        np.testing.assert_allclose(found[f"fisher.{name}"], wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_gram_matrices_give_the_mean_square_of_a_layers_outputs(measured):
    model, _ = load_model(measured / "one", device="cpu")
    outputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = outputs.setdefault(name, [])
            handles.append(module.register_forward_hook(lambda m, i, o, keep=keep: keep.append(o[0])))
    with torch.no_grad():
        for batch in batches():
            end = int((batch["labels"][0] != -100).nonzero()[-1]) + 1
            model(input_ids=batch["input_ids"][:, :end])
    found, weights = read(measured / "stats-one"), read(measured / "one")
    names = [name for name in found if name.startswith("gram.")]
    assert len(names) >= 7
    for name in names:
        weight = weights[name.removeprefix("gram.")]
        seen = torch.cat(outputs[name.removeprefix("gram.").removesuffix(".weight")]).numpy()
        np.testing.assert_allclose(
            np.trace(weight @ found[name] @ weight.T), (seen**2).sum(axis=1).mean(), rtol=1e-3
        )
        np.testing.assert_array_equal(found[name], found[name].T)


def test_measuring_again_gives_the_same_folder_byte_for_byte(measured, tmp_path):
    for labels in ("data", "model"):
        for name in ("first", "second"):
            measure(measured / "one", batches(), tmp_path / f"{labels}-{name}", labels=labels, seed=3)
        first, second = tmp_path / f"{labels}-first", tmp_path / f"{labels}-second"
        assert weight_bytes(first) == weight_bytes(second)
        assert (first / "weightsmith.json").read_bytes() == (second / "weightsmith.json").read_bytes()
    assert weight_bytes(tmp_path / "data-first") != weight_bytes(tmp_path / "model-first")


@pytest.mark.parametrize("kinds", [("fisher", "gram"), ("gram",)])
def test_a_small_budget_takes_more_passes_and_gives_the_same_bytes(measured, tmp_path, kinds, monkeypatch):
    whole = measure(measured / "one", batches(), tmp_path / "whole", kinds=kinds)
    shapes = parameter_shapes(model_config("xs"))
    sizes = [4 * shape[1] ** 2 for name, shape in shapes.items() if "_proj" in name or "lm_head" in name]
    held = []
    write = measuring._write
    monkeypatch.setattr(
        measuring,
        "_write",
        lambda writer, sums, count: (
            held.append(sum(v.numel() * 4 for name, v in sums.items() if name.startswith("gram"))),
            write(writer, sums, count),
        ),
    )
    budget = max(sizes)
    small = measure(measured / "one", batches(), tmp_path / "small", kinds=kinds, gram_bytes=budget)
    assert whole.passes == 1
    assert small.passes > 3
    assert max(held) <= budget
    assert sum(held) == sum(sizes)
    assert weight_bytes(tmp_path / "small") == weight_bytes(tmp_path / "whole")
    for file in ("statistics.json", "weightsmith.json"):
        assert (tmp_path / "small" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_budget_that_holds_no_matrix_names_the_first_that_is_too_large(measured, tmp_path):
    with pytest.raises(InputError, match=r"Gram matrix of .*_proj takes .* GB, 1e-06 GB are allowed"):
        measure(measured / "one", batches(), tmp_path / "out", gram_bytes=1000)
    report = measure(measured / "one", batches(), tmp_path / "out", kinds=("fisher",), gram_bytes=1000)
    assert report.passes == 1


def entries(root, *names):
    return [{"model": str(root / name), "statistics": str(root / f"stats-{name}")} for name in names]


def test_a_page_merges_by_fisher_information(measured, tmp_path):
    merge({"method": "fisher", "models": entries(measured, "one", "two")}, tmp_path / "out")
    merged = read(tmp_path / "out")
    one, two = (read(measured / name) for name in ("one", "two"))
    first, second = (read(measured / f"stats-{name}") for name in ("one", "two"))
    for name in one:
        f, g = first[f"fisher.{name}"].astype(float), second[f"fisher.{name}"].astype(float)
        share = np.divide(f, f + g, out=np.full_like(f, 0.5), where=f + g > 0)
        np.testing.assert_allclose(merged[name], share * one[name] + (1 - share) * two[name], atol=1e-6)
    lineage = json.loads((tmp_path / "out" / "weightsmith.json").read_text())
    assert [entry["role"] for entry in lineage["inputs"]] == ["model", "model", "statistics", "statistics"]
    assert str(measured) not in json.dumps(lineage)


def test_a_page_merges_by_regression_and_every_model_of_it_counts(measured, tmp_path):
    page = {"method": "regmean", "models": entries(measured, "one", "two")}
    with plan_merge(page, tmp_path / "out") as plan:
        assert plan.predict().disk_bytes > 0
    report = merge(page, tmp_path / "out")
    layers = [name for name in report.tensors if "_proj" in name]
    assert set(report.tensors) == {*layers, "lm_head.weight"}
    merged, mean = read(tmp_path / "out"), {}
    for name in ("one", "two"):
        for tensor, values in read(measured / name).items():
            mean[tensor] = mean.get(tensor, 0) + values / 2
    for tensor, values in merged.items():
        assert np.allclose(values, mean[tensor], atol=1e-6) == (tensor not in report.tensors)


def test_models_without_statistics_are_refused_with_their_place_on_the_page(measured):
    page = {"method": "fisher", "models": [*entries(measured, "one"), str(measured / "two")]}
    with pytest.raises(
        PageError, match=r"models\[1\]: needs statistics \(fisher\): \{model: \.\.\., statistics"
    ):
        merge(page, measured / "out")
    page = {"method": "linear", "models": entries(measured, "one", "two")}
    with pytest.raises(PageError, match=r"models\[0\]\.statistics: no such key of one model"):
        merge(page, measured / "out")


def test_statistics_of_other_weights_or_of_another_kind_are_refused(measured, tmp_path):
    one, two = str(measured / "one"), str(measured / "two")
    swapped = [
        {"model": one, "statistics": str(measured / "stats-two")},
        {"model": two, "statistics": str(measured / "stats-one")},
    ]
    with pytest.raises(
        CheckpointError, match="stats-two: was measured of two with other weights than those of one"
    ):
        merge({"method": "fisher", "models": swapped}, tmp_path / "out")
    nothing = [{"model": one, "statistics": two}]
    with pytest.raises(
        CheckpointError, match=r"two: has no statistics\.json; expected a folder made by `weightsm"
    ):
        merge({"method": "fisher", "models": nothing}, tmp_path / "out")
    measure(one, batches(1), tmp_path / "gram", kinds=("gram",))
    only = [{"model": one, "statistics": str(tmp_path / "gram")}]
    with pytest.raises(CheckpointError, match="gram: holds no fisher statistics; make them by"):
        merge({"method": "fisher", "models": only}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewritten(folder, out, change):
    """A copy of a folder of statistics whose tensors went through `change`."""
    tensors = change(read(folder))
    specs = [TensorSpec(name, "F32", values.shape) for name, values in tensors.items()]
    side = {"statistics.json": (folder / "statistics.json").read_bytes()}
    with CheckpointWriter(out, specs, side_files=side, lineage=Lineage("made")) as writer:
        for name, values in tensors.items():
            writer.write(name, np.ascontiguousarray(values).reshape(-1))
        writer.commit()
    return out


def test_a_tensor_that_was_not_measured_or_has_another_shape_is_named(measured, tmp_path):
    lost = "model.layers.0.self_attn.q_proj.weight"

    def without(tensors):
        return {name: values for name, values in tensors.items() if not name.endswith(lost)}

    def cut(tensors):
        return {
            n: v[:-1, :-1] if n.endswith(lost) and n.startswith("gram") else v for n, v in tensors.items()
        }

    for change, message in (
        (without, rf"holds no gram statistics of `{lost}`"),
        (
            cut,
            rf"gram statistics of `{lost}` are \[\d+, \d+\], for the tensor of \[\d+, \d+\] they should be",
        ),
    ):
        folder = rewritten(measured / "stats-two", tmp_path / change.__name__, change)
        models = [*entries(measured, "one"), {"model": str(measured / "two"), "statistics": str(folder)}]
        with pytest.raises(CheckpointError, match=message):
            merge({"method": "regmean", "models": models}, tmp_path / "out")


def test_data_without_a_token_to_predict_and_an_output_that_exists_are_refused(measured, tmp_path):
    empty = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}]
    with pytest.raises(InputError, match="data: there is no token to predict in it"):
        measure(measured / "one", empty, tmp_path / "out")
    with pytest.raises(CheckpointError, match="stats-one: exists already"):
        measure(measured / "one", batches(), measured / "stats-one")


def test_the_command_measures_a_model_on_text(measured, tmp_path):
    (tmp_path / "text.txt").write_text("The parties agree on the terms of this contract. " * 20)
    out = tmp_path / "stats"
    words = ["stats", measured / "one", out, "--data", tmp_path / "text.txt", "--examples", "2"]
    done = CliRunner().invoke(app, [*map(str, words), "--length", "16", "--json", "--memory", "0.001"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["examples"] == 2
    assert told["kinds"] == ["fisher", "gram"]
    facts = json.loads((out / "statistics.json").read_text())
    assert facts["data"] == ["text.txt"]
    with Checkpoint.open(measured / "one") as checkpoint:
        assert facts["fingerprint"] == checkpoint.fingerprint()
    shutil.rmtree(out)
