"""One training done in several ways, and what its parts did, as the page shows them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from weightsmith.errors import InputError
from weightsmith.reports import plot_decay
from weightsmith.reports.decay import MOST_LOOKS, draw_decay
from weightsmith.reports.findings import headline
from weightsmith.reports.folder import read_run
from weightsmith.reports.parts import clipping_panels, selection_panels, sharpness_panels
from weightsmith.reports.scores import score_tables
from weightsmith.reports.variants import comparisons
from weightsmith.reports.words import choice_words, part_words

from .made_runs import quickstart
from .made_ways import ways


@pytest.fixture
def run(tmp_path):
    return read_run(ways(tmp_path / "run").folder)


def test_stages_that_differ_in_parts_only_are_compared_with_the_plain_one(run):
    (comparison,) = comparisons(run)
    rows = {row.stage.name: row for row in comparison.rows}
    assert list(rows) == ["plain", "adagc", "decay", "flat"]
    assert {name: row.words for name, row in rows.items()} == {
        "plain": "",
        "adagc": "adagc (init ema)",
        "decay": "alphadecay (interval 20), learning_rate 0.001",
        "flat": "sam, ema (decay 0.9)",
    }
    assert rows["plain"].change is None
    assert not comparison.seeded
    assert rows["adagc"].change == pytest.approx(rows["adagc"].loss / rows["plain"].loss - 1)
    assert rows["flat"].slower == 2.0
    assert len({row.colour for row in rows.values()}) == 4
    for _, chart in comparison.charts:
        assert chart.count("<path") == 4


def test_a_run_without_variants_has_no_comparison(tmp_path):
    assert comparisons(read_run(quickstart(tmp_path / "run").folder)) == []


def test_the_plain_variant_is_the_base_of_the_scores_and_averages_have_a_place_of_their_own(run):
    (table,) = score_tables(run)
    assert table.base.name == "plain"
    assert {row.name: row.role for row in table.rows} == {
        "plain": "base",
        "adagc": "training",
        "decay": "training",
        "flat": "training",
        "best": "average",
    }
    (sentence,) = headline(table)
    assert sentence.striptags() == (
        "On the test split, best has the lowest bits per character on docs of 5 models: 2.400 against 2.600 "
        "for the base plain (−7.7 %)."
    )


def test_each_part_has_its_panels(run):
    clipping = [(panel.stage, panel.note) for panel in clipping_panels(run)]
    assert clipping.count(("adagc", "share clipped")) == 1
    assert ("plain", "norm of gradients") in clipping
    assert [panel.stage for panel in sharpness_panels(run)] == ["flat"]
    (chosen,) = selection_panels(run)
    assert "sewa: 2 of 3 states" in chosen.chart
    assert chosen.chart.count('class="bar"') == 2
    assert chosen.chart.count('class="left-out"') == 1
    assert chosen.note == "Loss on held-out data: top 2 2.1000."


def test_a_run_that_clips_globally_everywhere_has_no_panels_of_clipping(tmp_path):
    assert clipping_panels(read_run(quickstart(tmp_path / "run").folder)) == []


def test_decays_are_maps_of_layers_by_looks_one_for_each_kind(run):
    (alpha_words, alpha), (_, decay) = draw_decay(run.stage("decay").decays, "decay")
    assert "alpha" in alpha_words
    for chart, cells in ((alpha, 35), (decay, 40)):
        assert chart.count('class="cell"') == cells  # 2 kinds, 4 layers, 5 looks; one exponent is unknown
        assert chart.count(">up_proj<") == chart.count(">q_proj<") == 1
    assert "q_proj, layer 3, step 80: 10.6" in alpha


def test_a_long_history_is_thinned_to_its_end(run):
    records = [
        {"step": step, "alpha": {"layers.0.q": 2.0}, "weight_decay": {"layers.0.q": 0.1}}
        for step in range(500)
    ]
    (_, chart), _ = draw_decay(records)
    assert 20 < chart.count('class="cell"') <= MOST_LOOKS
    assert ">499<" in chart


def test_the_plot_of_a_history_stands_alone_and_is_the_same_from_the_file(run, tmp_path):
    file = run.stage("decay").folder / "alphadecay.jsonl"
    svg = plot_decay(file, tmp_path / "decay.svg")
    assert svg == plot_decay([json.loads(line) for line in file.read_text().splitlines()])
    assert (tmp_path / "decay.svg").read_text() == svg
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "--strong" in svg
    with pytest.raises(InputError, match="no look at the spectra"):
        plot_decay([])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, {}),
        ({"clip": {"global": 1.0}, "decay": "uniform", "sharpness": "off", "average": {"keep": {}}}, {}),
        ({"clip": "off"}, {"clip": "no clip"}),
        ({"clip": {"global": 0.5}}, {"clip": "clip at 0.5"}),
        ({"sharpness": {"lightsam": {"variant": "adam"}}}, {"sharpness": "lightsam (variant adam)"}),
        ({"average": "swa"}, {"average": "swa"}),
    ],
)
def test_parts_are_told_in_few_words(config, words):
    assert part_words(config) == words


def test_options_without_values_are_the_name_alone():
    assert choice_words({"sam": {}}) == "sam"
