"""The page of an evidence."""

from __future__ import annotations

import json
import re

import pytest

from weightsmith.errors import InputError
from weightsmith.reports import write_evidence_page

FIGURE = {
    "kind": "scatter",
    "title": "Balance",
    "x": "helpful",
    "y": "safe",
    "points": [{"name": "TIES & co", "group": "merge", "x": 0.5, "y": 0.6}],
}
WORDS = "# Merging: what is kept\n\nIt *holds*.\n\n| a | b |\n|---|---|\n| 1 | <2> |\n\n**Yes.**\n"


@pytest.fixture
def folder(tmp_path):
    results = {
        "seeds": [0, 1],
        "size": "xs",
        "seconds": 90.0,
        "verdict": "weaker claim",
        "environment": {"python": "3.11", "packages": {"torch": "2.9"}},
        "figures": [FIGURE],
    }
    (tmp_path / "resm.json").write_text(json.dumps(results))
    (tmp_path / "resm.md").write_text(WORDS)
    return tmp_path


def test_it_shows_verdict_facts_figure_and_tables(folder):
    page = write_evidence_page(folder, "resm").read_text()
    assert "A weaker form of the claim shows" in page
    for words in (
        "seeds 0, 1",
        "test-bed xs",
        "1 min 30 s",
        "arXiv:2502.06876",
        "packages torch",
        "TIES &amp; co",
    ):
        assert words in page
    assert re.search(r'<div class="scroll"[^>]*><table>.*<td>&lt;2&gt;</td>.*</table></div>', page, re.DOTALL)
    assert page.count("Merging: what is kept") == 1


def test_it_needs_no_network_and_is_the_same_twice(folder):
    page = write_evidence_page(folder, "resm").read_text()
    assert not re.search(r'(src|href)="https?:', page)
    assert "<script" not in page
    assert write_evidence_page(folder, "resm").read_text() == page


def test_without_figures_it_shows_the_drawing_of_the_evidence(folder):
    results = json.loads((folder / "resm.json").read_text())
    del results["figures"]
    (folder / "resm.json").write_text(json.dumps(results))
    assert "data:image/svg+xml" not in write_evidence_page(folder, "resm").read_text()
    (folder / "resm.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "data:image/svg+xml;base64," in write_evidence_page(folder, "resm").read_text()


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no results of `resm` \(expected resm.json and resm.md\)"):
        write_evidence_page(tmp_path, "resm")
