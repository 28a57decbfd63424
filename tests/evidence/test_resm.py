"""The evidence of RESM: its metrics and its verdict in closed form, a run in small, the card's verdict."""

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
        yield runpy.run_path(str(ROOT / "evidence" / "resm.py"))


def made_runs(script, domains, padded):
    """Three equal seeds with these retained gains; the rest has 30 to 40, or 90 where it must not count."""
    names = script["METHODS"]

    def arms(given):
        plain = {"average": 0.40, "task arithmetic": 0.40, "TIES": 0.30, "TSV-M": 0.40, "RESM": 0.40}
        return {name: {"test": {"mean": {**plain, **given}.get(name, 0.9)}} for name in names}

    return [
        {"domains": {"gate": {"holds": True}, "arms": arms(domains), "padded": arms(padded)}}
        for _ in range(3)
    ]


def test_five_candidates_for_the_soup_as_for_every_method(script):
    for count in (2, 3, 4, 6):
        found = script["soups"](count)
        assert len(set(found)) == len(script["STRENGTHS"]) == 5
        assert all(sum(weights) == pytest.approx(1) and len(weights) == count for weights in found)


def test_the_retained_gain_of_base_and_own_fine_tune(script):
    domains = script["DOMAINS"]
    base = dict.fromkeys(domains, 3.0)
    own = {f"D_{domain}": {**base, domain: 2.0} for domain in domains}
    bench = type("Bench", (), {"own": {"test": {"base": base, **own}}})()
    gain = script["retained_gain"]
    assert gain(bench, base, "test") == dict.fromkeys(domains, 0.0)
    assert gain(bench, dict.fromkeys(domains, 2.0), "test") == dict.fromkeys(domains, 1.0)
    assert gain(bench, dict.fromkeys(domains, 3.5), "test") == dict.fromkeys(domains, -0.5)


@pytest.mark.parametrize(
    ("domains", "padded", "verdict"),
    [
        ({"TSV-M": 0.43, "RESM": 0.43}, {"RESM": 0.41}, "reproduced"),
        ({"TSV-M": 0.43, "RESM": 0.43}, {"RESM": 0.40}, "weaker claim"),
        ({"TSV-M": 0.43, "RESM": 0.42}, {"RESM": 0.41}, "weaker claim"),  # a point below TSV-M
        ({"TSV-M": 0.41, "RESM": 0.41}, {"RESM": 0.41}, "not shown"),
        ({"TSV-M": 0.43, "task arithmetic": 0.42}, {"RESM": 0.41}, "not shown"),
    ],
)
def test_the_verdict_follows_from_the_numbers(script, domains, padded, verdict):
    assert script["judge"](made_runs(script, domains, padded))["verdict"] == verdict


def test_one_seed_below_the_average_is_enough_to_fail(script):
    runs = made_runs(script, {"TSV-M": 0.5, "RESM": 0.5}, {"RESM": 0.41})
    for name in ("TSV-M", "RESM"):
        runs[1]["domains"]["arms"][name]["test"]["mean"] = 0.39
    assert script["judge"](runs)["verdict"] == "not shown"


def test_a_gate_that_fails_shows_nothing(script):
    runs = made_runs(script, {"TSV-M": 0.5, "RESM": 0.5}, {"RESM": 0.41})
    runs[2]["domains"]["gate"]["holds"] = False
    assert script["judge"](runs)["verdict"] == "not shown"


def test_a_case_is_measured_once_for_the_same_bed_and_amount(script, tmp_path):
    made = script["Bed"](tmp_path / "base", {})
    calls = []

    def measured():
        calls.append(1)
        return {"gain": 0.5}

    quick = script["QUICK"]
    assert [script["kept"]("domains", made, quick, measured) for _ in range(2)] == [{"gain": 0.5}] * 2
    assert len(calls) == 1
    script["kept"]("skills", made, quick, measured)
    script["kept"]("domains", made, script["Amount"](), measured)
    assert len(calls) == 3


@pytest.mark.slow
def test_the_evidence_runs(script, tmp_path):
    script["main"](["--quick", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "resm.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "resm.md").read_text()
    assert (tmp_path / "resm.svg").stat().st_size > 1000


def test_the_cards_verdict_is_the_evidences():
    file = ROOT / "evidence" / "results" / "resm.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2]}
    assert len(results["seeds"]) >= 3
    assert card("resm").verdict == results["verdict"]
