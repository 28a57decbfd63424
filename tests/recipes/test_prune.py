"""The stage `prune`: what a page may say, runs of one-shot methods and of MaskPro, and a killed one."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoConfig, AutoModelForCausalLM

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression import read_masks
from weightsmith.compression.nm import write_masks
from weightsmith.errors import InputError, PageError
from weightsmith.evaluation import load_model
from weightsmith.merging import plan_merge
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe
from weightsmith.recipes.stages.prune import Prune
from weightsmith.reports.folder import read_run
from weightsmith.reports.page import render

from .conftest import page_of, small_model

PAGE = """\
name: tiny
stages:
  base: {train: {model: FOLDER/model, data: FOLDER/a.txt, sequence_length: 32, batch_size: 2, steps: 4}}
  plain: {prune: {model: base, method: magnitude}}
  sparse: {prune: {model: base, data: FOLDER/a.txt, samples: 4, batch_size: 2}}
  learned:
    prune:
      model: base
      pattern: "1:4"
      data: FOLDER/a.txt
      samples: 4
      batch_size: 2
      method: {maskpro: {init: magnitude, init_scale: 3, steps: 6, lr: 5}}
  scores: {evaluate: {models: [base, plain, sparse, learned], tasks: [FOLDER/a.txt]}}
"""


@pytest.fixture
def page(tmp_path):
    return page_of(tmp_path, PAGE)


def folders(tmp_path):
    return {
        name: tmp_path / "runs" / "tiny" / "stages" / name for name in ("base", "plain", "sparse", "learned")
    }


def test_pruned_models_load_anywhere_and_have_the_zeros_of_their_masks(page, tmp_path):
    planned = {stage.stage: stage.prediction for stage in plan_run(page(), root=tmp_path / "runs").stages}
    result = run_recipe(page(), root=tmp_path / "runs", executor=Inline())
    assert {stage.status for stage in result.stages} == {"finished"}
    where = folders(tmp_path)
    with Checkpoint.open(where["base"] / "checkpoint") as dense:
        for name, kept, moves in (("plain", 2, False), ("sparse", 2, True), ("learned", 1, False)):
            folder = where[name] / "checkpoint"
            masks = read_masks(folder)
            assert masks
            with Checkpoint.open(folder) as sparse:
                for tensor in dense.tensors:
                    before, after = dense.read(tensor), sparse.read(tensor)
                    if tensor not in masks:
                        assert np.array_equal(before, after), tensor
                        continue
                    mask = masks[tensor].kept.reshape(-1).numpy()
                    assert not after[~mask].any()
                    assert set(mask.reshape(-1, 4).sum(1)) == {kept}
                    assert np.array_equal(before[mask], after[mask]) != moves, tensor
            load_model(folder, device="cpu")
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            assert planned[name].disk_bytes == pytest.approx(size, rel=0.1)


def test_the_report_shows_masks_and_the_learning_beside_its_baselines(page, tmp_path):
    run_recipe(page(), root=tmp_path / "runs", executor=Inline())
    record = json.loads((folders(tmp_path)["learned"] / "pruning.json").read_text())
    assert set(record["losses"]) == {
        "dense",
        "magnitude",
        "wanda",
        "sparseswaps",
        "sparsegpt",
        "first",
        "maskpro",
    }
    assert record["losses"]["magnitude"] == pytest.approx(record["losses"]["first"])
    assert len(record["learning"]["losses"]) == 6
    html = render(read_run(tmp_path / "runs" / "tiny"))
    assert "Inside the pruning" in html
    assert "maskpro keeps 1 of every 4 weights" in html
    assert "Smaller models" in html


def test_a_page_that_says_nothing_of_data_takes_what_the_model_was_trained_on():
    from weightsmith.recipes.stages.finetune import Finetune

    earlier = {"base": Finetune(model="x", data=("docs", "names"))}
    stage, problems = Prune.parse({"model": "base", "method": "wanda"})
    assert (stage.completed(earlier).data, problems) == (("docs", "names"), [])
    with pytest.raises(InputError, match=r"data: wanda needs text to calibrate on, .* `base`"):
        stage.check_data()


FROM_MASKS = """\
name: tiny
stages:
  base: {train: {model: FOLDER/model, data: FOLDER/a.txt, sequence_length: 32, batch_size: 2, steps: 2}}
  learned:
    prune:
      model: base
      data: FOLDER/a.txt
      samples: 9
      batch_size: 4
      length: 12
      method: {maskpro: {init: FOLDER/first, init_scale: 30, steps: 1, lr: 5}}
"""


def test_masks_to_begin_with_are_an_input_of_the_stage(tmp_path):
    page = page_of(tmp_path, FROM_MASKS)
    with pytest.raises(
        PageError, match=r"maskpro\.init: expected magnitude, .* or the folder or file of masks; "
    ):
        load_page(page())
    runs, first = tmp_path / "runs", tmp_path / "first" / "weightsmith" / "masks.safetensors"
    plain = page((
        "{maskpro: {init: FOLDER/first, init_scale: 30, steps: 1, lr: 5}}", "sparsegpt"
    ))  # fmt: skip
    run_recipe(plain, root=runs, executor=Inline())
    made = runs / "tiny" / "stages" / "learned" / "checkpoint"
    shutil.copytree(made, tmp_path / "first")
    run_recipe(page(), root=runs, executor=Inline())
    again = run_recipe(page(), root=runs, executor=Inline())
    assert {stage.status for stage in again.stages} == {"reused"}
    with Checkpoint.open(made) as checkpoint:
        lineage = checkpoint.lineage
    assert [(entry.role, entry.name) for entry in lineage.inputs] == [("model", "base"), ("masks", "first")]
    assert lineage.inputs[1].lineage.method == "sparsegpt"
    facts = {key: lineage.parameters[key] for key in ("samples", "length", "batch_size", "init")}
    assert facts == {"samples": 9, "length": 12, "batch_size": 4, "init": "masks"}

    before = read_masks(made)
    write_masks(first, {name: replace(mask, kept=~mask.kept) for name, mask in before.items()})
    changed = run_recipe(page(), root=runs, executor=Inline())
    assert [stage.status for stage in changed.stages] == ["reused", "finished"]
    assert all(torch.equal(mask.kept, ~before[name].kept) for name, mask in read_masks(made).items())


def test_a_stage_calibrates_on_the_windows_that_it_names(tmp_path):
    small_model(tmp_path)
    body = {"model": "m", "data": str(tmp_path / "a.txt"), "samples": 9, "batch_size": 4, "length": 12}
    stage, problems = Prune.parse(body)
    assert problems == []
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model")).save_pretrained(
        tmp_path / "model"
    )
    batches = stage.calibration(tmp_path / "model", seed=0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 12), (4, 12), (1, 12)]


def test_a_seed_of_zero_is_a_seed():
    stage, _ = Prune.parse({"model": "m", "method": {"maskpro": {"seed": 0}}})
    left_open, _ = Prune.parse({"model": "m", "method": "maskpro"})
    assert (stage.method.seed, left_open.method.seed) == (0, None)


TUNED = """\
name: tiny
stages:
  base: {train: {model: FOLDER/model, data: FOLDER/a.txt, sequence_length: 32, batch_size: 2, steps: 2}}
  sparse: {prune: {model: base, method: magnitude}}
  tuned: {finetune: &more {model: sparse, data: FOLDER/b.txt, sequence_length: 32, batch_size: 2, steps: 4}}
  probed: {finetune: {<<: *more, optimizer: {mezo: {}}, learning_rate: 0.001, average: {keep: {every: 2}}}}
  adapted: {finetune: {<<: *more, adapter: {lora: {rank: 2, init: pissa}}, learning_rate: 0.1}}
  dense: {finetune: {<<: *more, keep_zeros: false}}
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    page, runs = page_of(folder, TUNED)(), folder / "runs"
    warned = {stage.stage: " ".join(stage.warnings) for stage in plan_run(page, root=runs).stages}
    with pytest.warns(UserWarning, match=r"pruned weights were no longer 0 after the training, as a merged"):
        run_recipe(page, root=runs, executor=Inline())
    return runs / "tiny" / "stages", warned


def test_a_pruned_model_stays_pruned_when_it_is_trained_further(tuned):
    stages, warned = tuned
    masks = read_masks(stages / "sparse" / "checkpoint")
    states = sorted((stages / "probed" / "states").glob("step-*"))
    assert states
    outputs = [stages / name / "checkpoint" for name in ("tuned", "probed", "adapted")]
    with Checkpoint.open(stages / "sparse" / "checkpoint") as before:
        for folder in (*outputs, *states):
            with Checkpoint.open(folder) as after:
                moved = [name for name in masks if not np.array_equal(before.read(name), after.read(name))]
                assert moved, folder
                for name, mask in masks.items():
                    assert not after.read(name)[~mask.kept.reshape(-1).numpy()].any(), (folder, name)
                assert after.lineage.parameters["carried"] == ["weightsmith/masks.safetensors"]
            assert read_masks(folder).keys() == masks.keys()
    assert "the merged adapter is masked again" in warned["adapted"]
    assert not warned["tuned"]


def test_a_pruned_model_of_the_hub_stays_pruned_too(tuned, tmp_path, monkeypatch):
    import huggingface_hub

    stages, _ = tuned
    published = stages / "sparse" / "checkpoint"

    def download(repo, *, allow_patterns, ignore_patterns=None, **_):
        snapshot = tmp_path / "snapshot"
        names = [str(file.relative_to(published)) for file in published.rglob("*") if file.is_file()]
        chosen = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in chosen:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(published / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    words = "{model: owner/sparse, data: FOLDER/b.txt, sequence_length: 32, batch_size: 2, steps: 2}"
    page = page_of(tmp_path, f"name: tiny\nstages:\n  tuned: {{finetune: {words}}}\n")
    run_recipe(page(), root=tmp_path / "runs", executor=Inline())
    made = tmp_path / "runs" / "tiny" / "stages" / "tuned" / "checkpoint"
    masks = read_masks(published)
    with Checkpoint.open(made) as after:
        assert not any(after.read(name)[~mask.kept.reshape(-1).numpy()].any() for name, mask in masks.items())
    assert read_masks(made).keys() == masks.keys()


def test_zeros_go_where_the_page_lets_them(tuned):
    stages, warned = tuned
    name, mask = next(iter(read_masks(stages / "sparse" / "checkpoint").items()))
    with Checkpoint.open(stages / "dense" / "checkpoint") as after:
        assert after.read(name)[~mask.kept.reshape(-1).numpy()].all()
    assert not (stages / "dense" / "checkpoint" / "weightsmith").exists()
    assert "`keep_zeros: false` lets its zeros go" in warned["dense"]


def test_a_merge_of_a_pruned_model_says_what_becomes_of_its_zeros(tuned, tmp_path):
    stages, _ = tuned
    models = [str(stages / name / "checkpoint") for name in ("sparse", "dense")]
    with plan_merge({"method": "linear", "models": models}, tmp_path / "merged") as plan:
        assert [warning for warning in plan.warnings if "pruned" in warning] == [
            "sparse is pruned: its zeros stay only where all models have them, and its masks are not carried "
            "over"
        ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("method: magnitude", "method: magnitud", "stages.plain.method: .*did you mean `magnitude`"),
        ('pattern: "1:4"', 'pattern: "4:4"', "stages.learned.pattern: .*must keep 1..3 of 4"),
        (
            'pattern: "1:4"',
            'pattern: "1:4"\n      export: semi-structured',
            "stages.learned.export: semi-structured matrices are 2:4, the pattern is 1:4",
        ),
        ("init_scale: 3", "init_scal: 3", "stages.learned.method.maskpro.init_scal: no such key"),
        ("steps: 6, lr: 5", "steps: 0, lr: 5", "stages.learned.method.maskpro.steps: .*at least 1"),
        ("samples: 4", "samples: 0", "samples: expected at least 1, got 0"),
        ("data: FOLDER/a.txt, samples", "data: FOLDER/none.txt, samples", "stages.sparse.data: .*none.txt"),
    ],
)
def test_a_wrong_page_is_told_by_line_and_key(page, old, new, said):
    with pytest.raises(PageError, match=said):
        load_page(page((old, new)))
