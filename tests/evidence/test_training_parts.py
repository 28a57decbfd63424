"""The evidence of the training parts runs, and a card's verdict is the one its committed results came to."""

import json
import runpy
from pathlib import Path

import pytest

from weightsmith.registry import card

EVIDENCE = Path(__file__).parents[2] / "evidence"
every = pytest.mark.parametrize("method", ["adagc", "alphadecay", "lightsam", "sewa", "tezo"])


@every
def test_the_evidence_runs(method, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EVIDENCE)
    runpy.run_path(str(EVIDENCE / f"{method}.py"))["main"](["--quick", "--out", str(tmp_path)])
    made = json.loads((tmp_path / f"{method}.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / f"{method}.md").read_text()
    assert (tmp_path / f"{method}.svg").stat().st_size > 1000


@every
def test_the_cards_verdict_is_the_evidences(method):
    file = EVIDENCE / "results" / f"{method}.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2]}
    assert len(results["seeds"]) >= 3
    assert card(method).verdict == results["verdict"]
