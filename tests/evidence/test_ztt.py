"""The evidence and the benchmark of the Zero-Token Transformer run, and its card's verdict is the one its
committed results came to."""

import json
import runpy
from pathlib import Path

import pytest

from weightsmith.registry import card

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "evidence")
    return runpy.run_path(str(ROOT / "evidence" / "ztt.py"))


def test_the_evidence_runs_and_goes_on_where_it_stopped(script, tmp_path):
    arguments = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    script["main"](arguments)
    made = json.loads((tmp_path / "ztt.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "ztt.md").read_text()
    (last,) = (tmp_path / "work").glob("*/0-hops-ZTT-4-2.json")
    last.unlink()  # stopped before this arm
    script["main"](arguments)
    again = json.loads((tmp_path / "ztt.json").read_text())
    assert last.exists()
    seconds = [[run.pop("seconds") for run in one["runs"]] for one in (made, again)]
    assert sum(old != new for old, new in zip(*seconds, strict=True)) <= 1
    assert [run.get("test") for run in again["runs"]] == [run.get("test") for run in made["runs"]]


def test_a_symbol_is_followed_as_often_as_the_row_says(script):
    import torch

    rows, labels = script["hops"](50, torch.Generator().manual_seed(0), 6)
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        goes_to = {pair // 8 - 1: pair % 8 for pair in row[:8]}
        assert sorted(goes_to) == sorted(goes_to.values()) == list(range(8))
        for place in range(8, len(row), 2):
            hops, at = row[place] // 8 - 8, row[place] % 8
            assert 1 <= hops <= 6
            for _ in range(hops):
                at = goes_to[at]
            assert row[place + 1] == at
            assert label[place : place + 2] == [-100, at]
        assert set(label[:8]) == {-100}


def test_the_cards_verdict_is_the_evidences():
    file = ROOT / "evidence" / "results" / "ztt.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2]}
    assert len(results["seeds"]) >= 3
    assert card("ztt").verdict == results["verdict"]


def test_the_benchmark_runs_and_its_contestants_agree(tmp_path):
    out = tmp_path / "ztt.json"
    runpy.run_path(str(ROOT / "benchmarks" / "ztt.py"))["main"](["--quick", "--out", str(out)])
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == {
        "attention, forward",
        "attention, forward and backward",
        "model",
        "cache",
        *(
            f"exit{who}, {heads}, {kind}"
            for who in ("", " of all")
            for heads in ("a key head each", "a key head for four")
            for kind in ("propagate", "copy")
        ),
    }
    assert sections["exit of all, a key head each, copy"]["ideal_gain"] > 2
    assert 1 < sections["exit, a key head each, copy"]["cycles"] < 3
