from __future__ import annotations

import pytest

from weightsmith.errors import PageError
from weightsmith.runs.pages import parse


def write(folder, text):
    path = folder / "page.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_are_plain_python_and_yaml_1_2(tmp_path):
    text = "a: 1e-3\nb: on\nc: [0x10, 1_000, true, null]\nd: 2026-01-02\ne: &x true\nf: *x\n"
    value = parse(write(tmp_path, text)).value
    expected = {"a": 1e-3, "b": "on", "c": [16, 1000, True, None], "d": "2026-01-02", "e": True, "f": True}
    assert value == expected
    kinds = [type(value["a"]), type(value["b"]), *map(type, value["c"]), type(value["d"]), type(value["f"])]
    assert kinds == [float, str, int, int, bool, type(None), str, bool]


def test_lines_are_those_of_the_keys_also_inside_flow_style(tmp_path):
    source = parse(write(tmp_path, "top:\n  a: 1\n  list:\n    - x\n    - {b: 1,\n       c: 2}\n"))
    assert source.line(("top",)) == 1
    assert source.line(("top", "a")) == 2
    assert source.line(("top", "list", 1)) == 5
    assert source.line(("top", "list", 1, "c")) == 6
    assert source.line(("top", "list", 1, "nothing", "deeper")) == 5


def test_merged_keys_count_like_written_ones(tmp_path):
    source = parse(write(tmp_path, "a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n"))
    assert source.value["b"] == {"x": 1, "y": 2}
    assert source.line(("b", "x")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"page\.yaml:3: a: is given twice"),
        ("a: [1, 2\nb: 3\n", r"page\.yaml:2: not valid YAML: "),
        ("a:\n\t- b\n", r"page\.yaml:2: not valid YAML: "),
        ("", r"page\.yaml: the page is empty"),
        ("# nothing but a comment\n", r"page\.yaml: the page is empty"),
        ("a:\n  b: !!python/object:os.system 1\n", r"page\.yaml:2: a\.b: the tag .*python.* is not allowed"),
        ("a:\n  1: x\n", r"page\.yaml:2: 1: keys must be text"),
        ("a: *nobody\n", r"page\.yaml:1: not valid YAML: "),
        ("a: " + "[" * 600, r"page\.yaml: nested too deeply"),
    ],
)
def test_a_wrong_page_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(PageError, match=message) as caught:
        parse(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_few_lines_of_aliases_that_stand_for_very_many_values_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weightsmith.runs.pages._MOST_VALUES", 1000)
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join(9 * ['*' + below])}]" for below, name in ("ab", "bc", "cd")]
    assert len(parse(write(tmp_path, "\n".join(lines[:2]))).value["b"]) == 9
    with pytest.raises(PageError, match=r"page\.yaml:\d: \S+: more than 1,000 values"):
        parse(write(tmp_path, "\n".join(lines)))


def test_a_page_that_is_not_text_names_the_line(tmp_path):
    path = tmp_path / "page.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(PageError, match=r"page\.yaml:2: not UTF-8 text"):
        parse(path)


def test_a_page_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(PageError, match=r"none\.yaml: no such file"):
        parse(tmp_path / "none.yaml")
