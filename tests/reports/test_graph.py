"""The drawn graph: every dependency readable, nothing on top of anything else."""

from __future__ import annotations

import itertools
import random

import pytest

from weightsmith.reports import graph
from weightsmith.reports.folder import read_run

from .made_runs import half_done, many_stages, quickstart, skills_of_a_users_models
from .made_ways import ways


def ancestors(reads):
    known = {}
    for name, sources in reads.items():
        known[name] = set(sources).union(*(known[source] for source in sources))
    return known


def random_reads(seed):
    rng = random.Random(seed)
    names = [f"s{index}" for index in range(rng.randrange(2, 30))]
    return {name: rng.sample(names[:i], k=rng.randrange(0, min(i, 5) + 1)) for i, name in enumerate(names)}


@pytest.mark.parametrize("seed", range(20))
def test_leaving_out_implied_arrows_keeps_who_descends_from_whom(seed):
    reads = random_reads(seed)
    kept = graph.without_implied(reads)
    assert ancestors(kept) == ancestors(reads)
    for name, sources in kept.items():
        for source in sources:
            fewer = kept | {name: [other for other in sources if other != source]}
            assert ancestors(fewer) != ancestors(reads), "an arrow that says nothing new"


def test_a_merge_is_not_joined_to_the_base_its_fine_tunes_come_from():
    reads = {"base": [], "a": ["base"], "b": ["base"], "m": ["base", "a", "b"]}
    assert graph.without_implied(reads)["m"] == ["a", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_arrows_point_right_and_boxes_never_overlap(seed):
    nodes = graph._layers(graph.without_implied(random_reads(seed)))
    layers = graph._place(list(nodes.values()))
    placed = [node for layer in layers for node in layer]
    for node in placed:
        assert all(other.layer == node.layer + 1 and other.x >= node.x + node.width for other in node.after)
    for one, other in itertools.combinations([node for node in placed if node.title], 2):
        apart_in_x = one.x + one.width <= other.x or other.x + other.width <= one.x
        assert apart_in_x or abs(one.y - other.y) >= graph.NODE_HEIGHT


def test_merges_of_the_same_models_share_one_meeting_point(tmp_path):
    drawing = graph.draw_graph(read_run(quickstart(tmp_path / "run").folder))
    assert drawing.count('class="meet"') == 1
    # base to 5, 4 to the meeting point, from there to 5 merges; those and the control, in 3 parts, to scores
    assert drawing.count('class="arrow"') == 5 + 4 + 5 + 5 + 3


def test_every_stage_is_a_box_and_shows_its_state(tmp_path):
    run = read_run(half_done(tmp_path / "run").folder)
    drawing = graph.draw_graph(run)
    assert drawing.count('<g class="node') == len(run.stages)
    assert drawing.count("s-done") == 1
    assert drawing.count("s-failed") == 1
    assert "finetune · not finished" in drawing


def test_a_training_shows_its_parts_and_its_data(tmp_path):
    drawing = graph.draw_graph(read_run(ways(tmp_path / "run").folder))
    assert "train · adagc, docs" in drawing


def test_models_from_outside_stand_at_the_left_by_their_last_name(tmp_path):
    drawing = graph.draw_graph(read_run(skills_of_a_users_models(tmp_path / "run").folder))
    assert drawing.count('class="node outside"') == 2
    assert ">Llama &lt;3&gt; &amp; co<" in drawing
    assert ">other-7b<" in drawing


def test_thirty_stages_keep_their_boxes(tmp_path):
    drawing = graph.draw_graph(read_run(many_stages(tmp_path / "run").folder))
    assert drawing.count('<g class="node') == 30
