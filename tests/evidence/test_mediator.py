"""The evidence and the benchmark of Mediator run, and its card's verdict is the one its committed results
came to."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from weightsmith.registry import card

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_evidence_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "evidence")
    runpy.run_path(str(ROOT / "evidence" / "mediator.py"))["main"](["--quick", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "mediator.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "mediator.md").read_text()


def test_the_cards_verdict_is_the_evidences():
    file = ROOT / "evidence" / "results" / "mediator.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2]}
    assert len(results["seeds"]) >= 3
    assert card("mediator").verdict == results["verdict"]


@pytest.mark.slow
def test_the_benchmark_runs_and_both_profiles_count_the_same(tmp_path):
    out = tmp_path / "mediator.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "mediator.py", "--quick", "--out", out],
        check=True,
        timeout=1200,
    )
    assert json.loads(out.read_text())["serving"]["bytes_of_copies"] < 1
