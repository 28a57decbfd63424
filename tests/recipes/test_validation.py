from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from weightsmith.recipes.validation import show, validate


@dataclass(frozen=True, kw_only=True)
class Inner:
    __pydantic_config__: ClassVar = {"extra": "forbid"}
    rank: int = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    data: str | Inner | tuple[str | Inner, ...] = "source"
    weight: float | tuple[float, ...] = 1.0
    mode: Literal["sum", "mean"] = "sum"
    steps: int = 1
    shuffle: bool = True
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def problems_of(**body):
    value, problems = validate(Config, {"model": "base", **body})
    assert (value is None) == bool(problems)
    return {show(problem.keys): problem.text for problem in problems}


def test_a_right_body_becomes_the_dataclass_with_lists_as_tuples():
    value, problems = validate(Config, {"model": "m", "weight": [1, 2.5], "data": ["a", {"rank": 4}]})
    assert problems == []
    assert value == Config(model="m", weight=(1.0, 2.5), data=("a", Inner(rank=4)))


@pytest.mark.parametrize(
    ("body", "where", "text"),
    [
        ({"stepps": 1}, "stepps", "no such key; did you mean `steps`?"),
        ({"inner": {"rnk": 1}}, "inner.rnk", "no such key; did you mean `rank`?"),
        ({"steps": "3"}, "steps", 'expected a whole number, found "3"'),
        ({"steps": 1.5}, "steps", "expected a whole number, found 1.5"),
        ({"steps": True}, "steps", "expected a whole number, found true"),
        ({"steps": 0}, "steps", "must be at least 1, got 0"),
        ({"shuffle": "yes"}, "shuffle", 'expected true or false, found "yes"'),
        ({"mode": "men"}, "mode", "expected 'sum' or 'mean', found 'men'; did you mean `mean`?"),
        ({"weight": "high"}, "weight", 'expected a number or a list, found "high"'),
        ({"weight": [1, "a"]}, "weight[1]", 'expected a number, found "a"'),
        ({"inner": 3}, "inner", "expected a mapping, found 3"),
        ({"data": ["a", 3]}, "data[1]", "expected text or a mapping, found 3"),
        ({"data": {"rnk": 3}}, "data.rnk", "no such key; did you mean `rank`?"),
    ],
)
def test_each_problem_is_told_at_its_own_key(body, where, text):
    assert problems_of(**body) == {where: text}


def test_a_missing_key_is_named():
    assert [(show(p.keys), p.text) for p in validate(Config, {})[1]] == [("model", "is missing")]


def test_a_misspelt_key_is_not_reported_as_missing_too():
    found = [(show(p.keys), p.text) for p in validate(Config, {"modle": "x"})[1]]
    assert found == [("modle", "no such key; did you mean `model`?")]


def test_all_problems_are_told_at_once():
    assert problems_of(steps="x", mode="y", z=1).keys() == {"z", "mode", "steps"}
