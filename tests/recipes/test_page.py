"""A wrong page is told line by line before anything starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightsmith.errors import PageError
from weightsmith.recipes import load_page

GOOD = """\
name: demo
seed: 7
stages:
  base: {train: {model: testbed/xs, data: [source, docs]}}
  code:
    finetune:
      model: base
      data: source
      replay: 0.25
  docs: {finetune: {model: base, data: docs}}
  merged:
    merge:
      method: ties
      base: base
      models: [code, {model: docs, weight: 0.5}]
      density: 0.3
      search: {lambda: [0.5, 1.0]}
  mean: {average: {models: [code, docs]}}
  scores: {evaluate: {models: [base, code, docs, merged], tasks: all}}
"""


@pytest.fixture
def load(tmp_path):
    def go(text):
        path = tmp_path / "page.yaml"
        path.write_text(text)
        return load_page(path)

    return go


def test_a_good_page_has_its_stages_in_order_and_what_each_needs(load):
    page = load(GOOD)
    assert (page.name, page.seed) == ("demo", 7)
    assert {name: (entry.kind, entry.stages) for name, entry in page.stages.items()} == {
        "base": ("train", ()),
        "code": ("finetune", ("base",)),
        "docs": ("finetune", ("base",)),
        "merged": ("merge", ("base", "code", "docs")),
        "mean": ("average", ("code", "docs")),
        "scores": ("evaluate", ("base", "code", "docs", "merged")),
    }


def test_what_a_page_leaves_to_earlier_stages_is_filled_in(load):
    page = load(GOOD)
    assert page.stages["code"].config.replay_data == ("source", "docs")
    assert page.stages["docs"].config.replay_data is None
    assert page.stages["scores"].config.tasks == ("source", "docs")
    assert page.stages["merged"].config.extras.search_tasks == ("source", "docs")


def test_the_name_defaults_to_the_files(load):
    assert load("stages: {base: {train: {model: testbed/xs, data: docs}}}").name == "page"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("density: 0.3", "densty: 0.3", "16: stages.merged.densty: no such key; did you mean `density`?"),
        ("density: 0.3", "density: 1.3", "16: stages.merged.density: must be in (0, 1], got 1.3"),
        ("density: 0.3", "density: high", "16: stages.merged.density: must be a number"),
        ("density: 0.3", "sarch: {}", "16: stages.merged.sarch: no such key; did you mean `search`?"),
        ("weight: 0.5", "wieght: 0.5", "15: stages.merged.models[1].wieght: no such key"),
        ("method: ties", "method: tise", "13: stages.merged.method: no method `tise`; did you mean `ties`?"),
        ("method: ties", "merge_method: ties", "13: stages.merged.merge_method: is mergekit's"),
        ("lambda: [0.5, 1.0]", "lambda: [0.5, x]", "17: stages.merged.search.lambda[1]: expected a number"),
        ("lambda: [0.5, 1.0]", "density: [0.5, 0.6]", "16: stages.merged.density: is searched too"),
        ("lambda: [0.5, 1.0]", "lamda: [0.5]", "17: stages.merged.search.lamda: no such key"),
        ("lambda: [0.5, 1.0]", "lambda: []", "17: stages.merged.search.lambda: expected at least one value"),
        ("models: [code, {", "models: [cod, {", "15: stages.merged.models[0]: `cod` is neither a stage"),
        ("models: [code, {", "models: [scores, {", "is defined below (line 19)"),
        ("models: [code, docs]}", "models: [mean, docs]}", "18: stages.mean.models[0]: a stage uses only"),
        ("model: base\n", "model: /nowhere/base\n", "7: stages.code.model: no such folder: /nowhere/base"),
        ("model: base\n", "model: a/b/c\n", "7: stages.code.model: no such folder: a/b/c"),
        ("model: base\n", "model: testbed/xs\n", "7: stages.code.model: `testbed/xs` has no weights yet"),
        ("testbed/xs", "testbed/xx", "4: stages.base.model: no test-bed model `testbed/xx`; did you mean"),
        ("replay: 0.25", "replay: 1.25", "9: stages.code.replay: expected in 0..1"),
        ("replay: 0.25", "replay: '0.25'", '9: stages.code.replay: expected a number, found "0.25"'),
        ("replay: 0.25", "epochs: 3", "9: stages.code.epochs: no such key"),
        ("data: source", "data: sourc", "8: stages.code.data: `sourc`: neither"),
        ("[source, docs]", "[source, dosc]", "4: stages.base.data[1]: `dosc`: neither"),
        ("[source, docs]", "[source, none.jsonl]", "4: stages.base.data[1]: none.jsonl: no such file"),
        ("[source, docs]", "[{source: docs, colum: x}]", "4: stages.base.data[0].colum: no such key"),
        ("tasks: all", "tasks: [docs, tabels]", "19: stages.scores.tasks[1]: no task `tabels`; did you mean"),
        ("docs, merged]", "docs, base]", "19: stages.scores.models[3]: `base` is listed twice"),
        ("evaluate:", "evalute:", "19: stages.scores.evalute: no stage kind `evalute`; did you mean"),
        ("seed: 7", "seed: -1", "2: seed: expected a whole number from 0 on, found -1"),
        ("seed: 7", "sead: 7", "2: sead: no such key; did you mean `seed`?"),
        ("name: demo", "name: ../demo", "1: name: a name is letters"),
        ("  mean: ", "  a/b: ", "18: stages.a/b: a stage's name is letters"),
        ("  mean: ", "  code: ", "18: code: is given twice"),
        ("{average: {", "{finetune: {}, average: {", "18: stages.mean: expected one stage kind"),
    ],
)
def test_each_mistake_is_named_with_line_key_and_cure(load, old, new, message):
    assert GOOD.count(old) >= 1
    with pytest.raises(PageError) as caught:
        load(GOOD.replace(old, new, 1))
    lines = str(caught.value).splitlines()
    assert any(f"page.yaml:{message}" in line or message in line for line in lines), lines
    assert caught.value.exit_code == 2


def test_every_problem_is_told_in_the_order_of_the_page(load):
    bad = GOOD.replace("density", "densty").replace("replay: 0.25", "replay: x").replace("seed: 7", "seed: a")
    with pytest.raises(PageError) as caught:
        load(bad)
    lines = [line.split(":")[1] for line in str(caught.value).splitlines()]
    assert lines == ["2", "9", "16"]


def test_a_broken_stage_does_not_make_stages_that_use_it_look_broken(load):
    with pytest.raises(PageError) as caught:
        load(GOOD.replace("data: [source, docs]", "dota: [source, docs]"))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}\n", "1: stages: expected at least one stage"),
        ("name: x\n", "1: stages: expected at least one stage"),
        ("- a\n", "1: expected the keys name, seed, stages"),
        ("stages: {base: train}\n", "1: stages.base: expected one stage kind"),
        ("stages: {base: {train: 3}}\n", "1: stages.base.train: expected a mapping"),
        ("stages: {base: {train: }}\n", "1: stages.base.model: is missing"),
    ],
)
def test_pages_that_are_hardly_pages(load, text, message):
    with pytest.raises(PageError) as caught:
        load(text)
    assert f"page.yaml:{message}" in str(caught.value)


def test_an_evaluate_stage_is_no_model(load):
    with pytest.raises(PageError, match="`scores` makes no model: it is an `evaluate` stage"):
        load(GOOD + "  more: {finetune: {model: scores, data: docs}}\n")


def test_a_folder_that_is_no_model_is_told_from_one_that_is(load, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    load(GOOD + f"  more: {{finetune: {{model: {tmp_path / 'model'}, data: docs}}}}\n")
    with pytest.raises(PageError, match=r"the folder has no config\.json"):
        load(GOOD + f"  more: {{finetune: {{model: {tmp_path / 'empty'}, data: docs}}}}\n")


def test_validation_imports_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "page.yaml").write_text(GOOD)
    code = (
        "import sys; from weightsmith.recipes import load_page; load_page(sys.argv[1]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "page.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
