"""Building, storing, changing and exporting a mediated model; all on disk, without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging import merge
from weightsmith.merging.mediator import (
    MediatorConfig,
    MediatorPlan,
    MediatorStore,
    build_mediator,
    conflict_profile,
    export_merged,
    plan_mediator,
)
from weightsmith.merging.mediator.sparse import kept, select

from .made import random_model, read, save, weight_bytes

LAYERS = 4


@pytest.fixture(scope="module", params=["F32", "BF16"])
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = random_model(0, layers=LAYERS)
    config = {"torch_dtype": "float32" if request.param == "F32" else "bfloat16"}
    save(root / "base", base, request.param, config)
    for index, name in enumerate(("math", "code", "law"), start=1):
        save(root / name, random_model(index, layers=LAYERS, near=base, spread=1e-2), request.param, config)
    return root


def experts(root, names=("math", "code", "law")):
    return {name: root / name for name in names}


def build(root, out, **options):
    plan = options.pop("plan", None)
    return build_mediator(root / "base", experts(root), out, MediatorConfig(**options), plan=plan)


def close(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, rtol=tolerance, err_msg=name)


def all_blocks(root):
    profile = plan_mediator(root / "base", experts(root))
    return profile.with_routed([block.block for block in profile.blocks])


def test_without_routed_blocks_the_model_is_the_average(folders, tmp_path):
    build(folders, tmp_path / "m", n_routed=0)
    merge(
        {"method": "linear", "models": [str(path) for path in experts(folders).values()]}, tmp_path / "mean"
    )
    assert weight_bytes(tmp_path / "m") == weight_bytes(tmp_path / "mean")
    with MediatorStore.open(tmp_path / "m") as store:
        assert store.routed_tensors == ()
        assert store.tasks == ("math", "code", "law")


def test_all_blocks_routed_in_full_are_each_expert(folders, tmp_path):
    build(folders, tmp_path / "m", expert_density=1.0, plan=all_blocks(folders))
    for task in ("math", "code", "law"):
        export_merged(tmp_path / "m", task, tmp_path / task)
        made, tuned = read(tmp_path / task), read(folders / task)
        routed = {name for name in made if ".layers." in name}
        tolerance = 1e-7 if "F32" in folders.name else 1e-3  # a bfloat16 difference is rounded once more
        close({n: made[n] for n in routed}, {n: tuned[n] for n in routed}, tolerance)


def test_even_weights_of_whole_experts_are_the_average(folders, tmp_path):
    build(folders, tmp_path / "m", expert_density=1.0, plan=all_blocks(folders))
    export_merged(tmp_path / "m", dict.fromkeys(("math", "code", "law"), 1 / 3), tmp_path / "even")
    merge(
        {"method": "linear", "models": [str(path) for path in experts(folders).values()]}, tmp_path / "mean"
    )
    close(read(tmp_path / "even"), read(tmp_path / "mean"), 1e-7 if "F32" in folders.name else 1e-3)


@pytest.mark.parametrize("dense", ["base", "mean"])
def test_experts_keep_the_largest_differences_from_the_dense_part(folders, tmp_path, dense):
    report = build(folders, tmp_path / "m", n_routed=2, dense=dense, expert_density=0.2)
    made = read(tmp_path / "m")
    tuned = {task: read(folders / task) for task in experts(folders)}
    with MediatorStore.open(tmp_path / "m") as store:
        assert {
            name.split(".mlp")[0].split(".self")[0] for name in store.routed_tensors if "mlp" in name
        } == set(report.plan.routed)
        for tensor in store.routed_tensors:
            centre = read(folders / "base")[tensor]
            if dense == "mean":
                centre = np.mean([tuned[task][tensor] for task in tuned], axis=0, dtype=np.float32)
            np.testing.assert_allclose(made[tensor], centre, rtol=5e-3, atol=1e-6)
            for task in tuned:
                residual = (tuned[task][tensor] - made[tensor]).reshape(-1)
                form, _ = store.experts[task].delta(tensor)
                change = store.merged(tensor, {task: 1.0}) - made[tensor].reshape(-1)
                if made[tensor].ndim < 2:
                    np.testing.assert_allclose(change, residual, rtol=5e-3, atol=1e-6)
                    continue
                assert form.count == kept(residual.size, 0.2)
                mask = select(residual, form.count)
                np.testing.assert_allclose(change, np.where(mask, residual, 0), rtol=5e-3, atol=1e-6)


def test_the_error_that_is_reported_is_what_is_missing(folders, tmp_path):
    report = build(folders, tmp_path / "m", n_routed=1, expert_density=0.3)
    (block,) = report.plan.routed
    base = read(folders / "base")
    export_merged(tmp_path / "m", "code", tmp_path / "code")
    made, tuned = read(tmp_path / "code"), read(folders / "code")
    names = [name for name in base if name.startswith(f"{block}.")]
    lost = sum(((made[name] - tuned[name]) ** 2).sum() for name in names)
    whole = sum(((base[name] - tuned[name]) ** 2).sum() for name in names)
    assert report.errors[block]["code"] == pytest.approx(np.sqrt(lost / whole), rel=0.02)


def test_a_largest_error_is_kept(folders, tmp_path):
    report = build(folders, tmp_path / "m", n_routed=1, max_rel_err=0.25)
    (errors,) = report.errors.values()
    assert all(0.1 < error <= 0.2501 for error in errors.values())


def test_the_plan_says_what_is_on_disk(folders, tmp_path):
    report = build(folders, tmp_path / "m", n_routed=2)
    with MediatorStore.open(tmp_path / "m") as store:
        assert store.plan == report.plan
        assert store.nbytes == report.bytes == report.plan.bytes
    profile = conflict_profile(folders / "base", experts(folders))
    by_name = {block.name: block for block in profile.blocks}
    for block in report.plan.blocks:
        said = by_name[block.block]
        assert block.bytes == (said.routed_bytes if block.decision == "routed" else said.averaged_bytes)


@pytest.mark.parametrize("layout", ["bitmap", "csr", "dense"])
@pytest.mark.parametrize("values", ["stored", "int8"])
def test_layouts_hold_the_same_experts(folders, tmp_path, layout, values):
    build(folders, tmp_path / "auto", n_routed=1)
    build(folders, tmp_path / "m", n_routed=1, layout=layout, values=values)
    with MediatorStore.open(tmp_path / "auto") as one, MediatorStore.open(tmp_path / "m") as other:
        for tensor in one.routed_tensors:
            first, second = (store.merged(tensor, {"law": 0.5}) for store in (one, other))
            scale = np.abs(first - one.read(tensor)).max()
            np.testing.assert_allclose(second, first, atol=scale / 100 if values == "int8" else 0)


def test_workers_do_not_change_a_byte(folders, tmp_path):
    for threads in (1, 2):
        build_mediator(
            folders / "base", experts(folders), tmp_path / str(threads), MediatorConfig(), threads=threads
        )
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert any(path.name == "expert-code.safetensors" for path in files)
    for path in files:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes(), path


def test_a_plan_that_was_changed_by_hand_is_built(folders, tmp_path):
    plan = plan_mediator(folders / "base", experts(folders))
    plan.with_routed(["model.layers.0", "model.layers.3"]).save(tmp_path / "plan.json")
    report = build(folders, tmp_path / "m", plan=tmp_path / "plan.json")
    assert report.plan.routed == ("model.layers.0", "model.layers.3")


def test_a_plan_of_other_models_is_refused(folders, tmp_path):
    plan = plan_mediator(folders / "base", experts(folders))
    with pytest.raises(InputError, match="made for the tasks math, code, law, found math, code"):
        build_mediator(folders / "base", experts(folders, ("math", "code")), tmp_path / "m", plan=plan)
    turned = {"math": folders / "law", "code": folders / "code", "law": folders / "math"}
    with pytest.raises(CheckpointError, match="another expert `math` than the one given"):
        build_mediator(folders / "base", turned, tmp_path / "m", plan=plan)
    with pytest.raises(InputError, match=r"no block `model\.layers\.9`"):
        plan.with_routed(["model.layers.9"])
    assert not (tmp_path / "m").exists()


def test_the_rest_is_averaged_by_any_method(folders, tmp_path):
    options = {"density": 0.5, "trim_scope": "tensor", "zero_sign": "positive"}
    report = build(folders, tmp_path / "m", n_routed=1, average="ties", average_options=options)
    page = {"method": "ties", "base": str(folders / "base"), **options}
    merge({**page, "models": [str(path) for path in experts(folders).values()]}, tmp_path / "ties")
    made, ties = weight_bytes(tmp_path / "m"), weight_bytes(tmp_path / "ties")
    routed = f"{report.plan.routed[0]}."
    assert all(made[name] == ties[name] for name in made if not name.startswith(routed))
    assert any(made[name] != ties[name] for name in made if name.startswith(routed))


def test_a_routed_head_is_an_expert_too(folders, tmp_path):
    report = build(folders, tmp_path / "m", n_routed=0, route_head=True)
    assert report.plan.routed == ("lm_head",)
    with MediatorStore.open(tmp_path / "m") as store:
        assert store.routed_tensors == ("lm_head.weight",)
        assert store.nbytes == report.bytes
    assert not np.array_equal(
        read(tmp_path / "m")["lm_head.weight"], read(folders / "math")["lm_head.weight"]
    )


def test_a_tied_head_is_untied_when_it_is_routed(tmp_path):
    base = random_model(0, layers=2)
    del base["lm_head.weight"]
    tied = {"tie_word_embeddings": True}
    save(tmp_path / "base", base, "F32", tied)
    for index, name in enumerate(("math", "code"), start=1):
        tuned = {key: value + 0.01 * index for key, value in base.items()}
        save(tmp_path / name, tuned, "F32", tied)
    report = build_mediator(
        tmp_path / "base",
        experts(tmp_path, ("math", "code")),
        tmp_path / "m",
        MediatorConfig(n_routed=0, route_head=True, expert_density=1.0),
    )
    assert any("untied" in warning for warning in report.warnings)
    made = read(tmp_path / "m")
    embedding = "model.embed_tokens.weight"
    np.testing.assert_allclose(made[embedding], base[embedding] + 0.015, atol=1e-6)
    np.testing.assert_array_equal(made["lm_head.weight"], base[embedding])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    export_merged(tmp_path / "m", "code", tmp_path / "code-only")
    np.testing.assert_allclose(
        read(tmp_path / "code-only")["lm_head.weight"], base[embedding] + 0.02, atol=1e-6
    )


def test_any_loader_takes_the_folder_for_a_plain_checkpoint(folders, tmp_path):
    build(folders, tmp_path / "m")
    with Checkpoint.open(tmp_path / "m") as made, Checkpoint.open(folders / "base") as base:
        assert made.tensors.keys() == base.tensors.keys()
        assert made.lineage.method == "mediator"
        assert [entry.role for entry in made.lineage.inputs] == ["base", "model", "model", "model"]
        assert made.fingerprint(full=True) == made.lineage.content


def test_an_expert_that_is_added_and_removed_leaves_nothing(folders, tmp_path):
    build_mediator(
        folders / "base", experts(folders, ("math", "code")), tmp_path / "m", MediatorConfig(n_routed=2)
    )
    with MediatorStore.open(tmp_path / "m") as store:
        before = {name: store.read(name) for name in store.checkpoint.tensors}
        changed = store.add_expert("law", folders / "law")
        assert store.tasks == ("math", "code", "law")
        assert store.plan.stale
        mean = np.mean([read(folders / task)["model.norm.weight"] for task in store.tasks], axis=0)
        np.testing.assert_allclose(store.read("model.norm.weight"), mean, rtol=1e-2)
        assert set(changed) == set(store.checkpoint.tensors) - set(store.routed_tensors)
        store.save(tmp_path / "three")
        store.remove_expert("law", folders / "law")
        assert store.tasks == store.average_of == ("math", "code")
        for name, values in before.items():
            np.testing.assert_allclose(store.read(name), values, rtol=1e-5, atol=1e-7)
        store.save(tmp_path / "two")
    for task in ("math", "code"):
        mine = (tmp_path / "two" / "weightsmith" / f"expert-{task}.safetensors").read_bytes()
        assert mine == (tmp_path / "m" / "weightsmith" / f"expert-{task}.safetensors").read_bytes()
    # An expert that came later is what it would have been from the start.
    plan = MediatorPlan.from_json(json.loads((tmp_path / "m/weightsmith/mediator.json").read_text())["plan"])
    chosen = plan_mediator(folders / "base", experts(folders)).with_routed(plan.routed)
    build(folders, tmp_path / "all", plan=chosen)
    law = "weightsmith/expert-law.safetensors"
    assert (tmp_path / "three" / law).read_bytes() == (tmp_path / "all" / law).read_bytes()


def test_a_removed_expert_stays_in_the_average_unless_its_checkpoint_is_given(folders, tmp_path, caplog):
    build(folders, tmp_path / "m", n_routed=1)
    with MediatorStore.open(tmp_path / "m") as store:
        assert store.remove_expert("law") == ()
        assert "give its checkpoint" in caplog.text
        assert store.average_of == ("math", "code", "law")
        with pytest.raises(CheckpointError, match="not the model that expert `code` was made from"):
            store.remove_expert("code", folders / "law")
        store.remove_expert("code")
        with pytest.raises(InputError, match="`math` is the last one"):
            store.remove_expert("math")


def test_a_missing_expert_is_named_and_never_served_without(folders, tmp_path):
    build(folders, tmp_path / "m", n_routed=1)
    (tmp_path / "m" / "weightsmith" / "expert-code.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expert-code\.safetensors: missing; expert `code`"):
        MediatorStore.open(tmp_path / "m")


def test_a_damaged_folder_says_what_is_wrong(folders, tmp_path):
    with pytest.raises(CheckpointError, match="a plain checkpoint, not a mediated model"):
        MediatorStore.open(folders / "base")
    build(folders, tmp_path / "m", n_routed=1)
    file = tmp_path / "m" / "weightsmith" / "expert-code.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"expert-code\.safetensors: truncated"):
        MediatorStore.open(tmp_path / "m")
    facts = tmp_path / "m" / "weightsmith" / "mediator.json"
    facts.write_text("{}")
    with pytest.raises(CheckpointError, match=r"mediator\.json: format None"):
        MediatorStore.open(tmp_path / "m")


def test_an_unknown_task_and_a_weight_that_is_no_number_are_refused(folders, tmp_path):
    build(folders, tmp_path / "m", n_routed=1)
    with pytest.raises(InputError, match="no task `maths`; did you mean `math`"):
        export_merged(tmp_path / "m", "maths", tmp_path / "x")
    with pytest.raises(InputError, match="weight of task `law`: expected a finite number, got nan"):
        export_merged(tmp_path / "m", {"law": float("nan")}, tmp_path / "x")


def test_nothing_is_left_of_a_build_that_fails(folders, tmp_path):
    broken = read(folders / "law")
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    save(tmp_path / "broken", broken, "F32", {"torch_dtype": "float32"})
    plan = all_blocks(folders)
    plan = MediatorPlan.from_json({**plan.to_json(), "fingerprints": {}})
    names = {"math": folders / "math", "code": folders / "code", "law": tmp_path / "broken"}
    with pytest.raises(CheckpointError, match=r"broken.*model\.layers\.1\.mlp\.up_proj\.weight"):
        build_mediator(folders / "base", names, tmp_path / "m", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_quantised_experts_are_refused(folders, tmp_path):
    save(
        tmp_path / "packed",
        read(folders / "law"),
        config={"quantization_config": {"quant_method": "gptq"}},
    )
    with pytest.raises(CheckpointError, match=r"packed: .*gptq"):
        build_mediator(folders / "base", {"a": folders / "math", "b": tmp_path / "packed"}, tmp_path / "m")


def test_building_does_not_import_torch():
    program = (
        "import sys, weightsmith.merging.mediator as m; m.build_mediator, m.export_merged, m.MediatorConfig; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
