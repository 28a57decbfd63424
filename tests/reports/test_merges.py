"""The page of a comparison is drawn from its JSON alone, partial or whole."""

import re
from html.parser import HTMLParser

import pytest

from weightsmith.errors import InputError
from weightsmith.reports import write_report
from weightsmith.reports.merges import render_comparison
from weightsmith.runs import write_json

VOID = {"meta", "br", "link", "hr", "img"}


def score(value):
    return {
        "bits": {"metric": "bits_per_byte", "value": value, "higher_is_better": False, "n": 9, "chance": None}
    }


def result(method, bits, **more):
    return {
        "method": method, "name": method, "paper": "", "spectral": False, "options": {"density": 0.3},
        "kept": True, "seconds": 1.0, "memory_bytes": 5e7, "bytes": 100, "warnings": [f"note on {method}"],
        "measures": {
            "relative_norm": 0.1, "distances": [0.2, 0.3], "cosine": [0.9, None], "against": [0.25, None],
            "layers": [{"layer": 0, "relative_norm": 0.1}, {"layer": None, "relative_norm": 0.2}],
        },
        "scores": score(bits), "gain": 0.1, **more,
    }  # fmt: skip


@pytest.fixture
def content():
    layer = {
        "relative_norm": [0.1, 0.2], "sign_conflict": 0.4, "weighted_sign_conflict": 0.3,
        "cosine": [[1.0, 0.1], [0.1, 1.0]], "parameters": 9,
    }  # fmt: skip
    return {
        "format": 1, "finished": True, "name": "page.yml", "page": "base: <b>\n", "keep": "all",
        "base": "start", "models": ["one & two", "ties"], "warnings": ["watch out"],
        "inputs": {"models": ["one & two", "ties"], "reference": "base",
                   "layers": [{"layer": 0, **layer}], "model": layer},
        "tasks": ["bits"], "split": "",
        "scores": {"start": score(2.0), "one & two": score(1.9), "ties": score(1.8)},
        "methods": [result("linear", 1.7), result("ties", 1.5)], "best": "ties",
        "cosine": [[1.0, 0.5], [0.5, 1.0]], "elements": 5000, "sampled": 1000,
        "waiting": [], "refused": {"slerp": "merges 2 <models>"}, "failed": {},
    }  # fmt: skip


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_needs_nothing_else(content):
    page = render_comparison(content)
    reader = Balanced()
    reader.feed(page)
    assert reader.open == []
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert "one &amp; two" in page
    assert "merges 2 &lt;models&gt;" in page
    assert "in a sample of 1,000 weights" in page
    assert "note on linear" in page
    assert page == render_comparison(content)


def test_a_merge_called_like_a_model_has_a_row_of_its_own(content):
    page = render_comparison(content)
    assert ">ties</th>" in page.replace("<small>", "</th>")
    assert "ties (merge)" in page
    assert "<b>ties (merge)</b> has the lowest bits per byte on bits of 2 merges" in page


def test_a_partial_comparison_says_what_is_missing(content):
    partial = content | {
        "methods": [], "cosine": [], "best": None, "waiting": ["ties"], "failed": {"linear": "out of memory"},
        "inputs": None, "scores": {}, "tasks": [],
    }  # fmt: skip
    page = render_comparison(partial)
    assert "Failed: <b>linear</b>: out of memory" in page
    assert "Not done yet: ties" in page
    assert "0 of 2 methods" in page


def test_a_page_of_another_version_is_refused_in_one_line(content, tmp_path):
    write_json(tmp_path / "comparison.json", content | {"format": 99})
    with pytest.raises(InputError, match="format 99, this version of weightsmith reads 1"):
        write_report(tmp_path)
    write_json(tmp_path / "comparison.json", content)
    assert write_report(tmp_path).read_text() == render_comparison(content)
