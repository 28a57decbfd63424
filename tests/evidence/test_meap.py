"""The evidence of MEAP runs in small, goes on where it stopped, and its verdict is the card's."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from weightsmith.registry import card

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "evidence")
        yield runpy.run_path(str(ROOT / "evidence" / "meap.py"))


def test_it_runs_in_small(script, tmp_path):
    script["main"](["--quick", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "meap.json").read_text())
    assert made["verdict"] in ("reproduced", "weaker claim", "not shown")
    assert f"**Verdict: {made['verdict']}.**" in (tmp_path / "meap.md").read_text()
    assert (tmp_path / "meap.svg").stat().st_size > 1000


def test_units_that_are_done_are_read(script, tmp_path):
    done = {
        "curve": [{"step": 1, "epochs": 1.0, "all": 7.0}],
        "test": {"all": 7.0, "repeat": 7.0, "other": 7.0},
        **{"recall": 0.5, "digits": 0.5, "nats": 1.0, "score_decay": 0.1, "reached": None, "exact": 0.0},
    }

    class Done:
        place = tmp_path.joinpath

        def __call__(self, name, make):
            return done

    (run,) = script["measure"]([0], script["QUICK"], Done())
    assert {run["text"][arm]["test"]["all"] for arm in script["ARMS"]} == {7.0}
    assert run["answers"]["MEAP"]["exact"] == 0.0


def runs(recall, loss, decay):
    """Three seeds with these values of MEAP; NTP has 0.5, 2.0 and 0.1."""

    def text(value):
        return {"test": {"all": value, "repeat": value, "other": value}}

    return [
        {
            "text": {"NTP": text(2.0), "MEAP": text(loss), "random tokens": text(2.0)},
            "needle": {
                arm: {"recall": value, "digits": value, "nats": 1.0}
                for arm, value in (("NTP", 0.5), ("MEAP", recall + 0.01 * seed), ("random tokens", 0.5))
            },
            "attention": {"NTP": {"score_decay": 0.1}, "MEAP": {"score_decay": decay}},
        }
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("recall", "loss", "decay", "verdict"),
    [
        (0.60, 2.03, 0.0, "reproduced"),
        (0.60, 2.05, 0.5, "not shown"),
        (0.53, 2.03, 0.5, "weaker claim"),
        (0.53, 2.03, 0.05, "not shown"),
    ],
)
def test_the_verdict_follows_its_criteria(script, recall, loss, decay, verdict):
    assert script["summarise"](runs(recall, loss, decay))["verdict"] == verdict


def test_what_repeats_the_context_is_six_in_a_row(script):
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 7]])
    found = script["continues"](row)[0].nonzero().flatten().tolist()
    assert found == [12]  # the second 6; the 7 comes after five that repeat, and doesn't


def test_the_needle_stands_at_its_depth_and_the_code_is_the_label(script):
    rows, labels = script["needle_rows"](5, (0.0, 1.0), 128, torch.zeros(500, dtype=torch.long), 3)
    assert rows.shape == (5, 128)
    assert (labels != -100).sum(1).tolist() == [5] * 5
    assert torch.equal(labels[:, -5:], rows[:, -5:])
    for number, row in enumerate(rows.tolist()):
        code = row[-5:]
        first = next(at for at in range(len(row)) if row[at : at + 5] == code)
        assert (first < 30) == (number % 2 == 0)


def test_the_cards_verdict_is_the_evidences():
    file = ROOT / "evidence" / "results" / "meap.json"
    results = json.loads(file.read_text()) if file.exists() else {"verdict": "open", "seeds": [0, 1, 2]}
    assert len(results["seeds"]) >= 3
    assert card("meap").verdict == results["verdict"]
