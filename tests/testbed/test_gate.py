"""The bed's own claim: it has something to win. The script that measures it also runs in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "evidence" / "testbed.py"
RESULTS = SCRIPT.parent / "results" / "testbed.json"


def measure(out, *options):
    subprocess.run([sys.executable, SCRIPT, "--out", out, *options], check=True, capture_output=True)
    return json.loads((out / "testbed.json").read_text())


def test_the_script_runs_in_small(tmp_path):
    results = measure(tmp_path, "--quick")
    assert results["domains"]["gate"]["holds"] is False  # a few steps teach nothing
    assert "| task_arithmetic |" in (tmp_path / "testbed.md").read_text()


def test_the_recorded_results_hold_the_gate():
    results = json.loads(RESULTS.read_text())
    assert len(results["seed_list"]) >= 3
    assert results["domains"]["gate"]["holds"]
    assert results["skills"]["gate"]["holds"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_gate_holds_on_this_machine(tmp_path):
    results = measure(tmp_path, "--seeds", "6")
    assert results["domains"]["gate"]["holds"]
    assert results["skills"]["gate"]["holds"]
