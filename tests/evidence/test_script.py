"""What the evidence scripts share: parts that are done are kept, by all that decides them."""

import runpy
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "evidence" / "script.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_part_that_is_done_is_read(script, tmp_path):
    chosen = Namespace(quick=False, work=tmp_path)
    made = []

    def make():
        made.append(1)
        return {"test": 1.5}

    for _ in range(2):
        with script["units"]("sums", chosen, {"steps": 3}) as unit:
            found = unit("0 text, one/two", make)
    assert found["test"] == 1.5
    assert found["seconds"] >= 0
    assert len(made) == 1
    assert [file.name for file in tmp_path.glob("*/*")] == ["0-text-one-two.json"]
    with script["units"]("sums", chosen, {"steps": 4}) as unit:
        unit("0 text, one/two", make)
    assert len(made) == 2


def test_a_part_that_fails_leaves_nothing(script, tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        script["units"]("sums", Namespace(quick=False, work=tmp_path), {}) as unit,
    ):
        unit("0", lambda: {"test": 1 / 0})
    assert not list(tmp_path.glob("*/*"))


def test_a_quick_run_keeps_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with script["units"]("sums", Namespace(quick=True, work=None), {}) as unit:
        unit("0", dict)
        folder = unit.folder
    assert not folder.exists()
    assert not list(tmp_path.iterdir())


def test_usually_parts_lie_under_runs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with script["units"]("sums", Namespace(quick=False, work=None), {}) as unit:
        unit("0", dict)
    assert [file.parts[:2] for file in Path("runs").glob("*/*/*")] == [("runs", "evidence-sums-work")]
