"""The strips of the merges: shared where the models decide, per merge where the method does."""

from __future__ import annotations

import pytest

from weightsmith.reports.diagnostics import merge_diagnostics
from weightsmith.reports.folder import read_run
from weightsmith.reports.strips import Strip, draw_strip

from .made_runs import diagnostics, quickstart

MODELS = ["code", "english", "codecs", "unicode"]


def groups(made):
    return merge_diagnostics(read_run(made.folder))


def test_merges_of_the_same_models_share_their_strips(tmp_path):
    (group,) = groups(quickstart(tmp_path / "run"))
    assert group.merges == ("arithmetic", "ties", "tsvm", "resm")
    assert group.title == "code, english, codecs, unicode"
    titles = [strip.title.split()[0] for strip in group.strips]
    assert titles == ["Distance", "Conflict:", "Cosine", "tsvm:", "resm:"]


def test_equal_ranks_are_a_sentence_and_unequal_ones_a_strip(tmp_path):
    made = quickstart(tmp_path / "run")
    (group,) = groups(made)
    assert group.notes[0] == "tsvm keeps 24 of 96 singular directions of every model."
    record = diagnostics(MODELS, layers=4, spectral=True)
    record["layers"][1]["ranks"] = [20.0, 30.0, 22.5, 24.0]
    made.write("resm", "diagnostics.json", record)
    (group,) = groups(made)
    strip = next(strip for strip in group.strips if strip.title.startswith("resm: singular"))
    assert strip.columns == ("0", "1", "2", "3", "rest", "all")
    assert strip.values[2] == [24.0, 22.5, 24.0, 24.0, None, 24.0]


def test_an_average_of_models_that_are_merged_too_adds_nothing(tmp_path):
    made = quickstart(tmp_path / "run")
    made.write("uniform", "diagnostics.json", diagnostics(MODELS, layers=4, spectral=False, reference="mean"))
    assert len(groups(made)) == 1
    other = diagnostics(["code", "english"], layers=4, spectral=False, reference="mean")
    made.write("uniform", "diagnostics.json", other)
    assert [group.title for group in groups(made)] == ["code, english", "code, english, codecs, unicode"]
    assert "from their mean" in groups(made)[0].strips[0].title


def test_many_models_show_mean_cosines_instead_of_every_pair(tmp_path):
    made = quickstart(tmp_path / "run")
    models = [f"m{index}" for index in range(6)]
    record = diagnostics(models, layers=2, spectral=False)
    record["layers"][0]["cosine"][0] = [1.0, 0.1, 0.2, None, 0.3, 0.4]
    made.write("ties", "diagnostics.json", record)
    strip = next(strip for group in groups(made) for strip in group.strips if "mean; 0 is" in strip.title)
    assert list(strip.rows) == models
    assert strip.values[0][0] == pytest.approx(0.25)


def test_few_layers_print_their_values_and_many_keep_them_as_tooltips():
    def drawn(layers):
        columns = [str(index) for index in range(layers)] + ["rest", "all"]
        values = [[0.25] * len(columns)]
        return draw_strip(Strip(title="t", rows=["m"], columns=columns, values=values, num_summaries=2))

    assert drawn(12).count(">0.25<") == 14
    assert drawn(80).count(">0.25<") == 2
    assert drawn(80).count("<title>m, layer ") == 82
    width = float(drawn(80).split('width="')[1].split('"')[0])
    assert width < 80 * 19 + 200


def test_what_does_not_exist_is_an_empty_cell_and_an_even_quantity_looks_even():
    strip = Strip(title="t", rows=["a", "b"], columns=["0", "1"], values=[[None, 0.5], [0.5, 0.5]])
    drawing = draw_strip(strip)
    assert drawing.count('class="none"') == 1
    assert drawing.count("--v:100%") == 3


@pytest.mark.parametrize(
    ("style", "value", "words"),
    [
        ({"as_percent": True}, 0.041, "4.1 %"),
        ({"as_percent": True}, 0.8, "80 %"),
        ({"whole": True}, 24.0, "24"),
        ({}, -0.001, "0.00"),
        ({}, -0.25, "−0.25"),
    ],
)
def test_values_print_in_the_unit_of_their_strip(style, value, words):
    assert Strip(title="t", rows=[], columns=[], values=[], **style).show(value) == words


def test_mean_ranks_print_one_digit_once_any_of_them_is_no_whole_number():
    strip = Strip(title="t", rows=["m"], columns=["0", "1"], values=[[29.0, 29.25]], whole=True)
    assert [strip.show(value) for value in strip.values[0]] == ["29.0", "29.2"]


def test_what_a_merge_warned_of_stands_beside_its_strips(tmp_path):
    made = quickstart(tmp_path / "run")
    made.write(
        "resm",
        "diagnostics.json",
        {**diagnostics(MODELS, layers=4, spectral=True), "warnings": ["2 tensors are odd"]},
    )
    (group,) = groups(made)
    assert "resm: 2 tensors are odd." in group.notes
