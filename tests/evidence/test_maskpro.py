"""The evidence of MaskPro runs in small, goes on where it stopped, and its verdict is the card's."""

import json
import runpy
from pathlib import Path

import pytest

from weightsmith.registry import card

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "evidence")
        yield runpy.run_path(str(ROOT / "evidence" / "maskpro.py"))


def test_it_runs_in_small(script, tmp_path):
    script["main"](["--quick", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "maskpro.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "maskpro.md").read_text()
    assert (tmp_path / "maskpro.svg").stat().st_size > 1000
    for run in made["runs"]:
        assert {"dense", "magnitude", "SparseGPT, updated", "MaskPro from magnitude"} <= run["arms"].keys()


def test_arms_that_are_done_are_read(script):
    arm = {"test": 7.0, "accuracy": 0.5, "changed": 0.1, "rate": 1.0}
    asked = []

    def unit(name, make):
        asked.append(name)
        return arm

    seeds = {"digits": [0], "projection": [], "model": []}
    (run,) = script["measure"](seeds, script["QUICK"], unit, None)
    assert {found["test"] for found in run["arms"].values()} == {7.0}
    assert {f"digits 0 {name}" for name in ("dense", "rate", script["MAIN"], *script["ABLATIONS"])} <= set(
        asked
    )
    assert run["groups"] == 2208


def runs(made_good, residual):
    """Five seeds: magnitude loses 1.0; MaskPro makes good these shares; its ablation ends at `residual`."""
    return [
        {
            "problem": "digits",
            "seed": seed,
            "arms": {
                "dense": {"test": 1.0},
                "magnitude": {"test": 2.0},
                "MaskPro from magnitude": {"test": 2.0 - share},
                "residual, no tracker": {"test": residual},
                "plain loss": {"test": 3.0},
            },
        }
        for seed, share in enumerate(made_good)
    ]


@pytest.mark.parametrize(
    ("made_good", "residual", "verdict"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.1], 1.9, "reproduced"),
        ([0.5, 0.5, 0.5, 0.1, 0.1], 1.9, "weaker claim"),
        ([0.5, 0.5, 0.5, 0.5, 0.1], 1.2, "weaker claim"),
        ([0.1, 0.1, 0.1, 0.1, 0.1], 1.2, "not shown"),
    ],
)
def test_the_verdict_follows_its_criteria(script, made_good, residual, verdict):
    assert script["summarise"](runs(made_good, residual))["verdict"] == verdict


def test_the_cards_verdict_is_the_evidences():
    file = ROOT / "evidence" / "results" / "maskpro.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2, 3, 4]}
    assert len(results["seeds"]) >= 5
    assert card("maskpro").verdict == results["verdict"]
