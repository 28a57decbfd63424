"""The page as a whole: self-contained, well-formed, the same bytes twice, and whole for any run."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from weightsmith.errors import InputError, SystemFault
from weightsmith.reports import write_report

from .made_runs import RunFolder, half_done, many_stages, quickstart, skills_of_a_users_models
from .made_ways import ways

RUNS = {
    "quickstart": quickstart,
    "half done": half_done,
    "own models": skills_of_a_users_models,
    "many": many_stages,
    "ways": ways,
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Collects what a browser would fetch, and complains about tags that don't close."""

    def __init__(self):
        super().__init__()
        self.open, self.problems, self.fetched, self.ids, self.labelled = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [(tag, key) for key in ("src", "href", "srcset", "data") if key in values]
        self.fetched += (
            [(tag, "script")] if tag == "script" or any(key.startswith("on") for key in values) else []
        )
        self.ids += [values["id"]] if "id" in values else []
        self.labelled += [values["aria-labelledby"]] if "aria-labelledby" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append((tag, self.getpos()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_well_formed_and_fetches_nothing(tmp_path, name):
    page = write_report(RUNS[name](tmp_path / "run").folder).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.problems == []
    assert checker.open == []
    assert checker.fetched == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.labelled) <= set(checker.ids)
    assert not re.search(r"url\((?!#head\))|@import|https?://", page)


@pytest.mark.parametrize("name", RUNS)
def test_every_chart_is_xml_and_has_a_name_for_those_who_cannot_see_it(tmp_path, name):
    page = write_report(RUNS[name](tmp_path / "run").folder).read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert charts
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert root.get("aria-label") == root.find("title").text != ""


@pytest.mark.parametrize("name", RUNS)
def test_the_same_folder_gives_the_same_bytes(tmp_path, name):
    made = RUNS[name](tmp_path / "run")
    first = write_report(made.folder).read_bytes()
    assert write_report(made.folder).read_bytes() == first


def test_the_quickstart_page_has_all_its_parts(tmp_path):
    page = write_report(quickstart(tmp_path / "run").folder).read_text(encoding="utf-8")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "Scores",
        "Recipe",
        "Training loss",
        "Strength search",
        "Inside the merges",
        "Time and memory",
        "Lineage",
        "Environment",
    ]
    assert page.count('class="plot"') == 6 + 1
    assert "✓ passed" in page
    assert "✗ missed" not in page
    assert "task_arithmetic, weight 0.4" in page
    assert "2.13.0" in page
    assert "last run 2026-11-21 21:04 UTC" in page


def test_a_partial_run_says_so_and_shows_what_it_has(tmp_path):
    page = write_report(half_done(tmp_path / "run").folder).read_text(encoding="utf-8")
    assert "1 of 12 stages are done; no model has been scored yet." in page
    assert "Failed: <b>code</b>: stages/code/work: no space left on device" in page
    assert "Started but not finished: english" in page
    assert "Not started: codecs, unicode, joint" in page
    assert "Scores</h2>" not in page
    assert page.count('class="plot"') == 2


def test_names_cannot_break_out_of_the_page(tmp_path):
    evil = '<script>alert("x")</script>&amp;'
    page = f"""\
name: 'a </title><img src=x> b'
stages:
  s: {{evaluate: {{models: ['{evil}'], tasks: all}}}} # {evil}
"""
    made = RunFolder(tmp_path / "run", page)
    made.finish("s", "evaluate", {})
    score = {"metric": "<b>", "value": 1.0, "higher_is_better": True, "n": 1}
    made.scores("s", {evil: {"</td>": score, "x": score}}, split="<i>")
    made.log("reused", "s", "evaluate")
    text = write_report(made.folder).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert (checker.problems, checker.open, checker.fetched) == ([], [], [])
    assert "&lt;script&gt;alert" in text


def test_the_recipe_is_shown_as_it_was_written(tmp_path):
    made = quickstart(tmp_path / "run")
    text = write_report(made.folder).read_text(encoding="utf-8")
    source = re.search(r"<pre[^>]*><code>(.*?)</code></pre>", text, re.DOTALL)[1]
    assert re.sub(r"</?[bi]>", "", source) == (made.folder / "recipe.yaml").read_text().rstrip("\n")
    assert "<i> # the control</i>" in source
    assert "<b>replay</b>: 0.25" in source


def test_ancestors_are_spelled_out_once(tmp_path):
    page = write_report(quickstart(tmp_path / "run").folder).read_text(encoding="utf-8")
    trees = page.split('class="trees"')[1].split("</section>")[0]
    assert re.findall(r'class="tree"><p><b>(\w+)</b>', trees) == [
        "joint",
        "uniform",
        "arithmetic",
        "ties",
        "tsvm",
        "resm",
    ]
    assert trees.count("data source, replay 0.25, steps 150") == 1
    assert trees.count("<b>code</b>") == 5


def test_reused_stages_are_told_from_those_that_ran(tmp_path):
    made = quickstart(tmp_path / "run")
    for name in ("base", "code"):
        made.log("reused", name)
    page = write_report(made.folder).read_text(encoding="utf-8")
    assert "The latest run found 2 of 12 stages done and reused them" in page
    assert page.count('<td class="">reused</td>') == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    made = quickstart(tmp_path / "run")
    (made.folder / "report.html").mkdir()
    with pytest.raises(SystemFault, match=r"report\.html"):
        write_report(made.folder)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(InputError, match=r"not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_neither_torch_nor_transformers_nor_matplotlib(tmp_path):
    made = quickstart(tmp_path / "run")
    code = (
        "import sys; from weightsmith.reports import write_report; write_report(sys.argv[1]); "
        "print({'torch', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_lineage_names_data_and_leaves_out_what_is_off(tmp_path):
    made = quickstart(tmp_path / "run")
    data = [
        {"source": "docs", "fingerprint": "testbed:d8ae"},
        {"source": "names", "fingerprint": "testbed:d8ae"},
    ]
    made.lineage("joint", "finetune", {}, {"data": data, "replay": 0.0, "steps": 450, "betas": [0.9, 0.95]})
    made.lineage("ties", "ties", {}, {"models": [{"model": "code"}], "density": 0.2, "rescale": False})
    page = write_report(made.folder).read_text(encoding="utf-8")
    assert "<b>joint</b> · finetune <small>data docs names, steps 450</small>" in page
    assert "<b>ties</b> · ties <small>density 0.2</small>" in page


def test_predictions_stand_beside_what_was_measured(tmp_path):
    page = write_report(quickstart(tmp_path / "run").folder).read_text(encoding="utf-8")
    row = re.search(r'<th scope="row">base</th><td class="">done</td>(.*?)</tr>', page, re.DOTALL)[1]
    assert re.findall(r">([^<>]+)</td>", row) == ["1 min 11 s", "1 min 20 s", "812 MB", "850 MB"]
    assert "predicted" not in write_report(half_done(tmp_path / "half").folder).read_text(encoding="utf-8")
