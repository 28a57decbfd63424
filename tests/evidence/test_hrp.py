"""The evidence of HRP runs, and its card's verdict is the one its committed results came to."""

import json
import runpy
from pathlib import Path

import pytest

from weightsmith.registry import card

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "evidence")
    return runpy.run_path(str(ROOT / "evidence" / "hrp.py"))


def test_the_evidence_runs_and_goes_on_where_it_stopped(script, tmp_path, capsys):
    words = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    script["main"](words)
    made = json.loads((tmp_path / "hrp.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "hrp.md").read_text()
    # The first part is exact: what it shows doesn't hang on steps or seeds.
    assert list(made["summary"]["checks"].values())[:5] == [True] * 5
    (kept,) = (tmp_path / "work").iterdir()
    stopped = next(kept.glob("trained-PiSSA-*.json"))
    stopped.unlink()
    capsys.readouterr()
    script["main"](words)
    again = json.loads((tmp_path / "hrp.json").read_text())
    assert again["runs"] == made["runs"]
    assert capsys.readouterr().out.count(" s)") == 1


def test_every_start_but_pissa_leaves_the_model_what_it_was(script):
    import torch

    texts = script["Texts"]()
    base = script["Decoder"](len(texts.alphabet))
    batch = texts.batch("source", "test", 0)
    with torch.no_grad():
        before = base(batch)
        for name, make in script["STARTS"].items():
            if name in ("PiSSA", "warm start of A and B"):
                continue
            with torch.enable_grad():
                model, spent = make(script["Start"](base, texts, 1e-3, 0))
            assert model(batch) == before, name
            assert spent == {"random": 0, "EVA": 5, "all": 0}.get(name.split()[0], 15)


def test_the_verdict_on_the_card_is_that_of_the_results():
    results = ROOT / "evidence" / "results" / "hrp.json"
    verdict = json.loads(results.read_text())["verdict"] if results.exists() else "open"
    assert card("hrp").verdict == verdict
