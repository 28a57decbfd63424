"""EMR against its three steps, and a folder for every task."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from weightsmith.cli.main import app
from weightsmith.errors import CheckpointError, InputError, PageError
from weightsmith.merging import merge, merge_state_dicts, merge_tensors, plan_merge
from weightsmith.recipes.stages.merge import Merge

from .made import page, read, weight_bytes


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(base, models, place):
    """Whole models as name -> array; entry by entry, one factor for all tensors."""
    own = kept = 0.0
    changes = {}
    for name in base:
        deltas = [(model[name] - base[name]).astype(float).reshape(-1) for model in models]
        out = np.zeros(base[name].size)
        for i, entry in enumerate(zip(*deltas, strict=True)):
            sign = np.sign(sum(entry))
            elected = sign * max([abs(x) for x in entry if x * sign > 0], default=0.0)
            out[i] = elected if entry[place] * elected > 0 else 0.0
        own, kept = own + abs(deltas[place]).sum(), kept + abs(out).sum()
        changes[name] = out.reshape(base[name].shape)
    return {name: base[name] + own / kept * changes[name] for name in base}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("coarse", [False, True])
def test_it_is_the_reference_entry_by_entry(place, coarse):
    base = {"a": normal(0, 6, 20), "b": normal(9, 15)}
    models = [{name: v + normal(seed, *v.shape) for name, v in base.items()} for seed in (1, 2, 3)]
    if coarse:  # whole numbers: votes that cancel, entries that nobody changed
        base, *models = ({name: np.round(v) for name, v in each.items()} for each in (base, *models))
    merged = merge_state_dicts(base, models, "emr", task=place + 1)
    wanted = reference(base, models, place)
    for name in base:
        np.testing.assert_allclose(merged[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_one_task_is_that_task():
    base, model = normal(0, 6, 20), normal(1, 6, 20)
    np.testing.assert_allclose(merge_tensors(base, [model], "emr", task=1), model, rtol=1e-5, atol=1e-6)


def test_each_task_keeps_the_mass_of_its_own_change():
    base, models = normal(0, 30, 20), [normal(seed, 30, 20) for seed in (1, 2, 3)]
    for place, model in enumerate(models):
        merged = merge_tensors(base, models, "emr", task=place + 1)
        np.testing.assert_allclose(abs(merged - base).sum(), abs(model - base).sum(), rtol=1e-4)
        assert ((merged - base) * (model - base) > -1e-6).all()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, r"task: must be the number of a model, 1 \.\. 2; none is named"),
        (3, r"task: must be the number of a model, 1 \.\. 2; got 3"),
        (0, "task: must be the number of a model, from 1 on, got 0"),
    ],
)
def test_a_task_that_is_no_model_is_named(task, message):
    with pytest.raises(InputError, match=message):
        merge_tensors(np.zeros(3), [np.ones(3), np.ones(3)], "emr", task=task)


def test_a_page_without_a_task_makes_a_folder_for_each(family, tmp_path):
    report = merge(page(family, "emr"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m1", "m2", "m3", "weightsmith.json"}
    for place, name in enumerate(("m1", "m2", "m3")):
        merge(page(family, "emr", task=place + 1), tmp_path / name)
        assert weight_bytes(tmp_path / "out" / name) == weight_bytes(tmp_path / name)
    assert report.parameters == 3 * sum(values.size for values in read(tmp_path / "m1").values())
    assert json.loads((tmp_path / "out" / "weightsmith.json").read_text())["method"] == "emr"
    with pytest.raises(CheckpointError, match="exists already"):
        merge(page(family, "emr"), tmp_path / "out")
    merge(page(family, "emr", models=("m1", "m2")), tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m1", "m2", "weightsmith.json"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_behind_where_a_task_fails(family, tmp_path):
    broken = page(family, "emr", models=("m1", "m2"))
    broken["models"].append(str(tmp_path / "no such model"))
    with pytest.raises(CheckpointError):
        merge(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_of_one_name_and_a_task_that_is_no_model_are_refused(family, tmp_path):
    with pytest.raises(InputError, match="two models are called m1: name the `task`, one page for each"):
        merge(page(family, "emr", models=("m1", "m1")), tmp_path / "out")
    with pytest.raises(PageError, match=r"task: must be the number of a model, 1 \.\. 3; got 4"):
        plan_merge(page(family, "emr", task=4))


def test_a_check_tells_the_cost_of_one_task_and_how_many_there_are(family, tmp_path):
    file = tmp_path / "page.yml"
    file.write_text(json.dumps(page(family, "emr")))
    done = CliRunner().invoke(app, ["merge", str(file), str(tmp_path / "out"), "--check", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["warnings"] == [
        "makes 3 folders, one for each task; what follows is for one"
    ]


def test_a_stage_of_a_recipe_needs_a_task():
    stage, problems = Merge.parse({"method": "emr", "base": "base", "models": ["a", "b"]})
    found = [*problems, *(stage.problems() if stage else ())]
    assert [problem.text for problem in found] == [
        "a stage makes one model: give the number of the model whose task it is for, 1 .. 2"
    ]
