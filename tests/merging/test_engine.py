"""Streaming: the same bytes whatever the tiles, threads and shards; whole outputs or none."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError, InputError, SystemFault
from weightsmith.merging import api, average, merge, merge_state_dicts, plan_merge, thinning
from weightsmith.merging.engine import execute

from .made import page, random_model, read, save, weight_bytes

CASES = {
    "linear": {"weight": [0.2, 0.5, 0.3]},
    "task_arithmetic": {"lambda": 0.4},
    "ties": {"density": 0.3},
    "ties in tensors": {"density": 0.3, "trim_scope": "tensor", "zero_sign": "positive", "rescale": "l1"},
    "dare_linear": {"density": 0.4, "seed": 7},
    "dare_ties": {"density": 0.4, "seed": 7},
    "dare_ties by norm": {"density": 0.4, "rescale": "l1", "zero_sign": "positive"},
    "della_linear": {"density": 0.4, "seed": 7},
    "della": {"density": 0.4, "seed": 7},
    "della by norm": {"density": 0.4, "rescale": "l1", "zero_sign": "positive"},
    "breadcrumbs": {"density": 0.3, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.3, "gamma": 0.1, "rescale": "l1"},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": [1.0, 3.0]},
    "nuslerp by rows": {"nuslerp_flatten": False},
    "nuslerp by columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {"weight": [0.2, 0.5, 0.3]},
    "karcher": {},
    "sce": {"select_topk": 0.3},
    "ram": {"epsilon": 1e-3},
    "ramplus_tl": {"epsilon": 1e-3},
    "nearswap": {"t": 1e-3},
    "arcee_fusion": {},
    "consensus": {"tall": [0.2, 0.4, 0.6], "lambda": 0.5},
    "emr": {"task": 2},
    "model_stock": {},
    "model_stock by row": {"filter_wise": True},
    "passthrough": {"scale": 1.5},
}
COUNTS = {"slerp": 1, "passthrough": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1}


def config(root, case, **options):
    method = case.split()[0]
    models = ("m1", "m2", "m3")[: COUNTS.get(method, 3)]
    return page(root, method, models, **(CASES[case] | options))


@pytest.mark.parametrize("case", CASES)
def test_streaming_gives_what_memory_gives_bit_for_bit(case, exact_family, tmp_path):
    made = config(exact_family, case)
    merge(made, tmp_path / "out")
    options = {key: value for key, value in made.items() if key not in ("method", "base", "models")}
    options = {
        key.replace("lambda", "lambda_"): tuple(v) if isinstance(v, list) else v for key, v in options.items()
    }
    base = read(made["base"]) if "base" in made else None
    models = [read(model) for model in made["models"]]
    wanted = merge_state_dicts(base, models, made["method"], **options)
    found = read(tmp_path / "out")
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_bytes_depend_on_neither_tiles_nor_threads_nor_shards(case, family, tmp_path, monkeypatch):
    merge(config(family, case), tmp_path / "plain", threads=1)
    wanted = weight_bytes(tmp_path / "plain")
    resharded = tmp_path / "resharded"
    for folder in ("base", "m1", "m2", "m3"):
        save(resharded / folder, read(family / folder), max_shard_bytes=2000)
    assert len(list((resharded / "base").glob("*.safetensors"))) > 3
    monkeypatch.setattr(api, "execute", lambda *a, **k: execute(*a, **k, tile_elements=100))
    merge(config(resharded, case), tmp_path / "other", threads=3)
    assert weight_bytes(tmp_path / "other") == wanted


@pytest.mark.parametrize("case", ["dare_ties by norm", "della by norm", "breadcrumbs_ties"])
def test_thinning_again_gives_what_was_remembered(case, family, tmp_path, monkeypatch):
    made = config(family, case, zero_sign="positive")
    monkeypatch.setattr(api, "execute", lambda *a, **k: execute(*a, **k, tile_elements=100))
    written = []
    for room in (1 << 24, 100, 0):  # all tiles, two of three models, none
        monkeypatch.setattr(thinning, "_KEPT_BYTES", room)
        merge(made, tmp_path / str(room), threads=1)
        written.append(weight_bytes(tmp_path / str(room)))
    assert written[0] == written[1] == written[2]


def test_two_runs_write_the_same_folder_byte_for_byte(family, tmp_path):
    for name in ("one", "two"):
        merge(config(family, "dare_ties"), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_masks_change_with_the_seed(family, tmp_path):
    merge(config(family, "dare_linear", seed=1), tmp_path / "one")
    merge(config(family, "dare_linear", seed=2), tmp_path / "two")
    assert weight_bytes(tmp_path / "one") != weight_bytes(tmp_path / "two")


def test_average_is_the_mean_rounded_once(family, tmp_path):
    average([family / f"m{index}" for index in (1, 2, 3)], tmp_path / "out")
    models = [read(family / f"m{index}") for index in (1, 2, 3)]
    for name, found in read(tmp_path / "out").items():
        mean = np.mean([model[name] for model in models], axis=0, dtype=np.float64)
        # Half a unit in the last place of bfloat16 (8 bits), and float32's own rounding.
        np.testing.assert_allclose(found, mean, rtol=2**-8, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "stored", "stated"), [("float32", "F32", "float32"), ("fp16", "F16", "float16")]
)
def test_the_output_has_the_dtype_asked_for_in_weights_and_config(family, tmp_path, dtype, stored, stated):
    merge(page(family, "linear", out_dtype=dtype, dtype="bfloat16"), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as out:
        assert {info.dtype for info in out.tensors.values()} == {stored}
        assert out.config["torch_dtype"] == stated
        assert "dtype" not in out.config


def test_without_a_dtype_every_tensor_keeps_its_own_and_files_are_carried_over(family, tmp_path):
    merge(page(family, "ties"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (family / "base" / "config.json").read_bytes()
    with Checkpoint.open(tmp_path / "out") as out:
        assert {info.dtype for info in out.tensors.values()} == {"BF16"}


def test_lineage_names_method_options_and_ancestors_but_no_path(family, tmp_path):
    merge(page(family, "ties", density=0.3), tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "weightsmith.json").read_text())
    assert lineage["method"] == "ties"
    assert lineage["parameters"]["density"] == 0.3
    assert [(entry["role"], entry["name"]) for entry in lineage["inputs"]] == [
        ("base", "base"),
        ("model", "m1"),
        ("model", "m2"),
        ("model", "m3"),
    ]
    assert lineage["inputs"][1]["lineage"]["method"] == "made"
    assert str(family) not in json.dumps(lineage)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", CASES)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(case, value, family, tmp_path):
    broken = read(family / "m1")
    broken["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save(tmp_path / "m1", broken)
    made = config(family, case)
    made["models"][0] = str(tmp_path / "m1")
    with pytest.raises(
        CheckpointError, match=r"^m1: model.layers.1.mlp.up_proj.weight holds .* at element 53 of 384"
    ):
        merge(made, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m1"]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_weight_that_is_not_finite_counts_as_zero_where_that_is_asked_for(dtype, exact_family, tmp_path):
    for folder in ("base", "m2", "m3"):
        save(tmp_path / folder, read(exact_family / folder), dtype)
    broken = read(exact_family / "m1")
    name = "model.layers.1.mlp.up_proj.weight"
    broken[name][3, 5] = np.inf
    save(tmp_path / "m1", broken, dtype)
    made = page(tmp_path, "ties", nan_policy="zero", zero_sign="positive", trim_scope="tensor")
    merge(made, tmp_path / "out")
    broken[name][3, 5] = 0
    save(tmp_path / "clean" / "m1", broken, dtype)
    made["models"][0] = str(tmp_path / "clean" / "m1")
    merge(made | {"nan_policy": "raise"}, tmp_path / "wanted")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "wanted")


def test_integer_tensors_are_copied_and_must_be_equal(family, tmp_path):
    steps = np.array([5, 6], np.int64)
    for folder, value in (("base", steps), ("m1", steps), ("m2", steps + 1)):
        save(tmp_path / folder, read(family / folder) | {"model.steps": value})
    merge(page(tmp_path, "ties", ["m1"]), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as out:
        np.testing.assert_array_equal(out.read("model.steps"), steps)
    with pytest.raises(CheckpointError, match=r"m2: model.steps \(I64\) differs from that of base"):
        plan_merge(page(tmp_path, "ties", ["m2"]))


def test_tied_weights_are_merged_once_and_stay_tied(family, tmp_path):
    for folder in ("base", "m1", "m2"):
        tensors = read(family / folder)
        del tensors["lm_head.weight"]
        save(tmp_path / folder, tensors, config={"tie_word_embeddings": True})
    merge(page(tmp_path, "linear", ["m1", "m2"]), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as out:
        assert "lm_head.weight" not in out.tensors
        assert out.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_stored_copy_of_a_tied_tensor_is_passed_over_but_an_untied_one_is_not(family, tmp_path):
    tied = read(family / "base")
    del tied["lm_head.weight"]
    save(tmp_path / "base", tied, config={"tie_word_embeddings": True})
    save(tmp_path / "copy", read(family / "m1"), config={"tie_word_embeddings": True})
    save(tmp_path / "own", read(family / "m1"))
    merge(page(tmp_path, "task_arithmetic", ["copy"]), tmp_path / "out")
    assert "lm_head.weight" not in read(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"own: stores its own `lm_head.weight`, in base it is tied"):
        plan_merge(page(tmp_path, "task_arithmetic", ["own"]))


def test_an_existing_output_is_left_alone_unless_it_may_be_replaced(family, tmp_path):
    merge(page(family, "linear"), tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        merge(page(family, "ties"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "weightsmith.json").read_text())["method"] == "linear"
    merge(page(family, "ties"), tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "weightsmith.json").read_text())["method"] == "ties"


def test_a_disk_without_room_is_told_before_the_first_byte(family, tmp_path, monkeypatch):
    real = os.statvfs

    def full(path):
        facts = list(real(path))
        facts[4] = 1  # blocks free to users
        return os.statvfs_result(facts)

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(SystemFault, match="GB of disk"):
        merge(page(family, "linear"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_merged_as_the_model_it_stands_for(family, tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (16, 2)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "elsewhere/base",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    at = "base_model.model.model.layers.1.self_attn.q_proj."
    save_file({at + "lora_A.weight": a, at + "lora_B.weight": b}, adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = read(family / "base")[name] + 0.5 * 2 * b @ a
    forms = ({"base": str(family / "base"), "models": [str(adapter)]}, {})
    forms[1].update(forms[0], models=[f"{family / 'base'}+{adapter}"])
    for index, form in enumerate(forms):
        merge(
            form | {"method": "task_arithmetic", "lambda": 0.5, "dtype": "float32"}, tmp_path / f"out{index}"
        )
        np.testing.assert_allclose(read(tmp_path / f"out{index}")[name], wanted, rtol=1e-5, atol=1e-6)


def test_progress_reaches_the_bytes_of_the_output(family, tmp_path):
    calls = []

    class Told:
        def start(self, label, total, unit):
            calls.append([label, total, 0.0])

        def advance(self, amount):
            calls[-1][2] += amount

        def done(self):
            pass

    merge(page(family, "ties"), tmp_path / "out", progress=Told())
    label, total, reached = calls[-1]
    assert (label, total) == ("merge", 2 * sum(v.size for v in random_model(0).values()))
    assert reached == pytest.approx(total)
    assert all(reached == pytest.approx(total) for _, total, reached in calls)


def test_element_wise_merges_never_import_torch(family, tmp_path):
    code = (
        "import sys, json; from weightsmith.merging import merge\n"
        "merge(json.loads(sys.argv[1]), sys.argv[2])\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
    )
    made = json.dumps(page(family, "dare_ties"))
    done = subprocess.run(
        [sys.executable, "-c", code, made, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["linear", "ties", "tsvm"])
def test_predictions_are_exact_for_disk_and_say_something_for_the_rest(method, family, tmp_path):
    with plan_merge(page(family, method), tmp_path / "out", device="cpu") as plan:
        prediction = plan.predict()
        assert not list(tmp_path.iterdir())
    merge(page(family, method), tmp_path / "out", device="cpu")
    assert prediction.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert prediction.seconds > 0
    assert prediction.memory_bytes > 1e7


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_memory_is_predicted_within_a_third(method, family, tmp_path):
    code = (
        "import sys, json; from weightsmith.merging import merge, plan_merge\n"
        "from weightsmith.runs.memory import peak_rss_bytes\n"
        "page = json.loads(sys.argv[1])\n"
        "with plan_merge(page, sys.argv[2]) as plan: predicted = plan.predict().memory_bytes\n"
        "merge(page, sys.argv[2]); print(peak_rss_bytes() / predicted)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(page(family, method)), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 / 1.3 < float(done.stdout) < 1.3


def test_an_existing_output_and_a_full_disk_are_told_by_the_check_too(family, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already; choose another output or pass --overwrite"):
        plan_merge(page(family, "linear"), tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0))
    with (
        plan_merge(page(family, "linear"), tmp_path / "new") as plan,
        pytest.raises(SystemFault, match="GB of disk"),
    ):
        plan.predict()


class Usage:
    def __init__(self, free):
        self.free = free


def test_float64_models_are_merged_with_a_warning(family, tmp_path):
    for folder in ("m1", "m2"):
        save(tmp_path / folder, read(family / folder), "F64")
    with plan_merge(page(tmp_path, "linear", ["m1", "m2"])) as plan:
        assert plan.warnings == ("float64 tensors are merged in float32, as all others are",)


def test_spectral_methods_take_matrices_whole_and_average_the_rest(exact_family, tmp_path):
    report = merge(page(exact_family, "tsvm"), tmp_path / "out", device="cpu")
    base, models = read(exact_family / "base"), [read(exact_family / f"m{i}") for i in (1, 2, 3)]
    found = read(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    np.testing.assert_allclose(found[norm], np.mean([m[norm] for m in models], axis=0), atol=1e-6)
    wanted = merge_state_dicts(base, models, "tsvm")
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert set(report.tensors) == {name for name in found if "_proj" in name}
    assert all("ranks" in info for info in report.tensors.values())
