"""What `--check` says of the models: facts, what differs, and whether they are fine-tunes of the base."""

import json

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging import merge, plan_merge
from weightsmith.merging.check import check

from .made import page, random_model, read, save
from .test_vocabulary import BASE, M1, tokenizer_files


def checked(config):
    with plan_merge(config) as plan:
        return check(plan)


def test_the_sampled_distance_is_that_of_the_matrices_and_unrelated_models_are_told(tmp_path):
    base = random_model(0)
    save(tmp_path / "base", base, "F32")
    save(tmp_path / "m1", random_model(1, near=base, spread=2e-3), "F32")
    save(tmp_path / "m2", random_model(2), "F32")
    save(tmp_path / "m3", base, "F32")
    found = checked(page(tmp_path, "task_arithmetic"))
    matrices = [name for name, values in base.items() if values.ndim == 2]
    for entry in found["models"][1:]:
        model = read(tmp_path / entry["name"])
        one = np.concatenate([model[name].ravel() for name in matrices]).astype(np.float64)
        other = np.concatenate([base[name].ravel() for name in matrices]).astype(np.float64)
        change = np.linalg.norm(one - other) / np.linalg.norm(other)
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        # The sample holds all of matrices as small as these.
        np.testing.assert_allclose(entry["ancestry"]["relative_norm"], change, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(entry["ancestry"]["cosine"], cosine, rtol=1e-6, atol=1e-9)
    first, second = found["warnings"]
    assert first.startswith("m2: unrelated to base (cosine ")
    assert second == "m3: equal to base in all sampled weights; it adds nothing"
    assert found["models"][0]["ancestry"] is None


def test_without_a_base_models_are_measured_from_the_first(tmp_path):
    for seed, name in enumerate(("m1", "m2")):
        save(tmp_path / name, random_model(seed))
    found = checked(page(tmp_path, "linear", ("m1", "m2")))
    assert found["models"][0]["ancestry"] is None
    assert found["warnings"][0].startswith("m2: unrelated to m1")


def test_lineage_says_who_descends_from_whom(family, tmp_path):
    merge(page(family, "task_arithmetic", ("m1", "m2")), tmp_path / "child")
    config = {
        "method": "linear",
        "base": str(family / "base"),
        "models": [str(tmp_path / "child"), str(family / "m3")],
    }
    found = checked({**config, "method": "task_arithmetic"})
    said = {entry["name"]: entry["ancestry"] and entry["ancestry"]["lineage"] for entry in found["models"]}
    assert said == {"base": None, "child": "from the base", "m3": "does not name the base"}


def test_facts_of_the_models_and_what_differs_are_told(tmp_path):
    base = random_model(0, vocabulary=8)
    chat = tokenizer_files(BASE) | {"chat_template.jinja": b"{{ 'a' }}"}
    save(tmp_path / "base", base, config={"eos_token_id": 1, "bos_token_id": 0}, side=chat)
    other = tokenizer_files(M1) | {"chat_template.jinja": b"{{ 'b' }}"}
    other["generation_config.json"] = json.dumps({"eos_token_id": [3, 4]}).encode()
    tuned = random_model(1, near=base, vocabulary=8)
    save(tmp_path / "m1", tuned, config={"eos_token_id": 3, "bos_token_id": 0, "pad_token_id": 7}, side=other)
    found = checked(page(tmp_path, "task_arithmetic", ("m1",), tokenizer="union"))
    base, model = found["models"]
    assert (base["layers"], base["dtypes"], base["tokens"], base["rows"]) == (2, ["BF16"], 6, 8)
    assert base["special_tokens"] == {"bos": "<s>", "eos": "</s>"}
    assert model["special_tokens"] == {"bos": "<s>", "eos": ["</s>", "x"], "pad": "y"}
    assert found["warnings"][:2] == [
        "m1: its eos token is ['</s>', 'x'], base has '</s>'; the output has the latter",
        "m1: its pad token is 'y', base has none; the output has the latter",
    ]
    assert found["warnings"][2].startswith(
        "m1: its chat template is not that of base, which the output keeps"
    )
    asked = checked(page(tmp_path, "task_arithmetic", ("m1",), tokenizer="union", chat_template="auto"))
    assert not any("template" in warning for warning in asked["warnings"])


def test_an_output_that_is_or_holds_an_input_is_refused(family, tmp_path):
    for name in ("base", "m1"):
        save(tmp_path / name, read(family / name))
    made = page(tmp_path, "task_arithmetic", ("m1",))
    before = read(tmp_path / "m1")
    with pytest.raises(
        CheckpointError, match=r"/m1: holds m1, an input of this merge; choose another output$"
    ):
        merge(made, tmp_path / "m1", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds base, an input of this merge"):
        merge(made, tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "m1")
    with pytest.raises(CheckpointError, match=r"holds m1, an input"):
        merge(made, tmp_path / "link", overwrite=True)
    for name, values in read(tmp_path / "m1").items():
        np.testing.assert_array_equal(values, before[name])


def test_a_device_without_effect_is_told_and_an_unknown_one_refused(family):
    with plan_merge(page(family, "ties"), device="cuda") as plan:
        assert plan.warnings == ("device `cuda` has no effect: `ties` computes on the CPU",)
    with plan_merge(page(family, "tsvm"), device="cuda") as plan:
        assert plan.warnings == ()
    with pytest.raises(InputError, match=r"^device: no device `gpu`; expected auto, cpu, cuda"):
        plan_merge(page(family, "ties"), device="gpu")
