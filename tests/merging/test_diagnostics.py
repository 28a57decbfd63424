import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging import diagnose, merge, plan_merge

SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.q.weight": (8, 8),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.q.weight": (8, 12),
    "model.norm.weight": (8,),
}
LAYERS = {
    0: ["model.layers.0.q.weight", "model.layers.0.norm.weight"],
    1: ["model.layers.1.q.weight"],
    None: ["model.embed_tokens.weight", "model.norm.weight"],
}


def weights(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def models(tmp_path):
    """Base and three fine-tunes in memory, and their folders; the third changed little and not everywhere."""
    base = weights(0)
    tuned = [{name: base[name] + 0.1 * value for name, value in weights(seed).items()} for seed in (1, 2, 3)]
    tuned[2]["model.layers.1.q.weight"] = base["model.layers.1.q.weight"].copy()
    tuned[2]["model.layers.0.q.weight"][:4] = base["model.layers.0.q.weight"][:4]
    folders = []
    for name, values in zip(["base", "a", "b", "c"], [base, *tuned], strict=True):
        folder = tmp_path / name
        folder.mkdir()
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
        folders.append(str(folder))
    return base, tuned, folders


def expected(base, tuned, names):
    """All measures from their definitions, entry by entry."""
    flat = np.concatenate([base[name].ravel() for name in names]).astype(np.float64)
    deltas = [np.concatenate([model[name].ravel() for name in names]) - flat for model in tuned]
    conflicts = changed = 0
    for entry in zip(*deltas, strict=True):
        changed += any(x != 0 for x in entry)
        conflicts += any(x > 0 for x in entry) and any(x < 0 for x in entry)
    norms = [np.linalg.norm(delta) for delta in deltas]
    return {
        "parameters": flat.size,
        "relative_norm": [norm / np.linalg.norm(flat) for norm in norms],
        "sign_conflict": conflicts / changed,
        "weighted_sign_conflict": 1
        - np.abs(sum(deltas)).sum() / sum(np.abs(delta).sum() for delta in deltas),
        "cosine": [
            [d @ e / (m * n) if m * n > 0 else None for e, n in zip(deltas, norms, strict=True)]
            for d, m in zip(deltas, norms, strict=True)
        ],
    }


def assert_close(found, wanted):
    for key, value in wanted.items():
        numbers = np.array(found[key], dtype=float)  # None becomes NaN
        np.testing.assert_allclose(numbers, np.array(value, dtype=float), rtol=1e-5, atol=1e-6, err_msg=key)


def test_every_measure_follows_its_definition_in_every_layer(models):
    base, tuned, folders = models
    found = diagnose({"method": "ties", "base": folders[0], "models": folders[1:]})
    assert found["models"] == ["a", "b", "c"]
    assert found["reference"] == "base"
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, None]
    for layer in found["layers"]:
        assert_close(layer, expected(base, tuned, LAYERS[layer["layer"]]))
    assert_close(found["model"], expected(base, tuned, list(SHAPES)))
    # A model that left layer 1 alone has no direction there.
    assert found["layers"][1]["relative_norm"][2] == 0
    assert found["layers"][1]["cosine"][2] == [None, None, None]
    json.dumps(found, allow_nan=False)


def test_a_method_without_a_base_is_measured_from_the_pages_base_or_from_the_mean(models):
    base, tuned, folders = models
    with_base = diagnose({"method": "linear", "base": folders[0], "models": folders[1:]})
    assert with_base["reference"] == "base"
    assert_close(with_base["model"], expected(base, tuned, list(SHAPES)))
    without = diagnose({"method": "linear", "models": folders[1:]})
    assert without["reference"] == "mean"
    mean = {name: sum(model[name] for model in tuned) / np.float32(3) for name in SHAPES}
    wanted = expected(mean, tuned, list(SHAPES))
    assert without["model"]["weighted_sign_conflict"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(without["model"]["relative_norm"], wanted["relative_norm"], rtol=1e-5)


def test_one_model_has_nobody_to_disagree_with(models):
    _, _, folders = models
    found = diagnose({"method": "task_arithmetic", "base": folders[0], "models": folders[1:2]})["model"]
    assert (found["sign_conflict"], found["weighted_sign_conflict"], found["cosine"]) == (0, 0, [[1]])


def test_models_that_changed_nothing_have_norm_zero_and_no_conflict_to_speak_of(models):
    _, _, folders = models
    found = diagnose({"method": "ties", "base": folders[0], "models": [{"model": folders[1]}, folders[1]]})
    assert found["model"]["sign_conflict"] == 0
    same = {"method": "linear", "models": [folders[1], folders[1]]}
    assert diagnose(same)["model"]["sign_conflict"] is None
    assert diagnose(same)["model"]["relative_norm"] == [0, 0]


def test_the_numbers_do_not_depend_on_the_number_of_threads(models):
    _, _, folders = models
    page = {"method": "ties", "base": folders[0], "models": folders[1:]}
    assert diagnose(page, threads=1) == diagnose(page, threads=3)


def test_ranks_and_weights_of_a_spectral_merge_are_told_by_layer(models, tmp_path):
    _, _, folders = models
    page = {"method": "resm", "base": folders[0], "models": folders[1:]}
    with plan_merge(page) as plan:
        bare = diagnose(plan)
    assert "ranks" not in bare["layers"][0]
    report = merge(page, tmp_path / "out")
    found = diagnose(page, tensors=report.tensors)
    first, second, outside = found["layers"]
    one = report.tensors["model.layers.0.q.weight"]
    assert first["ranks"] == one["ranks"]
    assert first["weights"] == one["weights"]
    assert first["full_rank"] == 8
    assert second["ranks"][2] == 0  # changed nothing there
    assert "ranks" not in outside  # embeddings and norms are averaged
    means = np.mean([info["ranks"] for info in report.tensors.values()], axis=0)
    np.testing.assert_allclose(found["model"]["ranks"], means)


def test_progress_counts_every_element(models):
    class Counter:
        total = seen = 0.0

        def start(self, label, total, unit):
            self.total = total

        def advance(self, amount):
            self.seen += amount

        def done(self):
            pass

    _, _, folders = models
    counter = Counter()
    diagnose({"method": "ties", "base": folders[0], "models": folders[1:]}, progress=counter)
    assert counter.seen == counter.total == sum(int(np.prod(shape)) for shape in SHAPES.values())


def test_a_weight_that_is_not_a_number_names_its_model_and_tensor(models):
    _, tuned, folders = models
    tuned[1]["model.norm.weight"][3] = np.nan
    save_file(tuned[1], f"{folders[2]}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"b: model\.norm\.weight holds nan"):
        diagnose({"method": "ties", "base": folders[0], "models": folders[1:]})


def test_slices_of_layers_are_refused(models):
    _, _, folders = models
    slices = [{"sources": [{"model": folders[1], "layer_range": [0, 1]}]}] * 2
    with pytest.raises(InputError, match="slices of layers"):
        diagnose({"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
