"""What a run shows, in sentences: which merge won and by how much, and whether the bed it stands on is sound.

One run has one seed, so a lead is called a lead only where it is larger than what chance alone moves: two
standard errors of the difference for shares of items; half a percent of the value for everything else, about
what a change of seed moves on the small bed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from weightsmith.reports.folder import Run
from weightsmith.reports.scores import Cell, Column, Row, ScoreTable
from weightsmith.testbed.domains import DOMAINS

SMALL_LEAD = 0.005
DOMAIN_GAIN, ARITHMETIC_GAIN, SKILL_GAIN = 0.07, 0.04, 0.10


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the bed's gate: what moved, how far, how far it has to."""

    what: str
    detail: str
    change: str
    needed: str
    passed: bool


def headline(table: ScoreTable) -> list[Markup]:
    """Plain sentences on what won, one group of them per metric of the table."""
    sentences: list[Markup] = []
    seen: set[str] = set()
    means = [index for index, column in enumerate(table.columns) if column.task is None]
    singles = [index for index, column in enumerate(table.columns) if column.task is not None]
    for index in means + singles:
        column = table.columns[index]
        if column.metric not in seen:
            seen.add(column.metric)
            sentences += _sentences(table, index)
    return sentences


def gate(run: Run, table: ScoreTable) -> list[Check]:
    """The bed's own checks, for those stages the run has; empty for other people's models and data.

    Every domain fine-tune has to lower its own domain's bits by 7 %, task arithmetic the mean over domains by
    4 %, every skill fine-tune has to gain 10 points on its own skills. Below that a bed has no room to tell
    methods apart.
    """
    base = table.base
    if base is None:
        return []
    checks = []
    for row in table.of_role("fine-tune"):
        for index, column in enumerate(table.columns):
            cell = row.cells[index]
            if not cell.own or cell.change is None or column.task is None:
                continue
            if column.is_share or column.task in DOMAINS:
                needed = SKILL_GAIN if column.is_share else DOMAIN_GAIN
                checks.append(
                    _check(f"{row.name} on its own {column.task}", base.cells[index], cell, column, needed)
                )
    domains = [index for index, column in enumerate(table.columns) if column.task in DOMAINS]
    for row in table.of_role("merge"):
        if row.stage is None or row.stage.method != "task_arithmetic" or len(domains) < 2:
            continue
        before, after = _mean(base, domains), _mean(row, domains)
        if before and after is not None:
            cell = Cell(value=after, change=(before - after) / before)
            what = f"{row.name}, mean of {len(domains)} domains"
            checks.append(_check(what, Cell(value=before), cell, table.columns[domains[0]], ARITHMETIC_GAIN))
    return checks


def lead_is_small(best: Cell, other: Cell, column: Column) -> bool:
    """Whether the difference of two values is within what chance moves."""
    if best.value is None or other.value is None:
        return True
    difference = abs(best.value - other.value)
    if column.is_share and best.stderr is not None and other.stderr is not None:
        return difference <= 2 * math.hypot(best.stderr, other.stderr)
    return difference < SMALL_LEAD * abs(other.value)


def _sentences(table: ScoreTable, index: int) -> list[Markup]:
    column = table.columns[index]
    merges = _ranked(table.of_role("merge"), index, column)
    if not merges:
        return _without_merges(table, index)
    best = merges[0]
    cell = best.cells[index]
    if cell.change is not None and cell.change <= 0:
        lead = Markup("no merge beats the base on {}; the closest is <b>{}</b> with {}")
        lead = lead.format(_what(column), best.name, _value(column, cell))
    elif len(merges) > 1:
        lead = Markup("<b>{}</b> has the {} {} of {} merges: {}").format(
            best.name, _most(column), _what(column), len(merges), _value(column, cell)
        )
    else:
        lead = Markup("the merge <b>{}</b> has {} {}").format(best.name, _value(column, cell), _what(column))
    sentences = [Markup("{}, {}{}.").format(_on_split(table), lead, _against(table, index, cell))]
    for second in merges[1:2]:
        value = _value(column, second.cells[index])
        small = lead_is_small(cell, second.cells[index], column)
        text = (
            "Its lead over <b>{}</b> ({}) is too small to call from one run."
            if small
            else "Next is <b>{}</b> with {}."
        )
        sentences.append(Markup(text).format(second.name, value))
    for control in _ranked(table.of_role("control"), index, column)[:1]:
        sentences.append(_compare_control(control, cell, index, column))
    return sentences


def _against(table: ScoreTable, index: int, cell: Cell) -> Markup:
    """What the best merge is held against: the base, or without one the best model that is no merge."""
    column = table.columns[index]
    if table.base and cell.change is not None:
        # A base that is called so needs no second name.
        name = Markup("") if table.base.name == "base" else Markup(" <b>{}</b>").format(table.base.name)
        return Markup(" against {} for the base{} ({})").format(
            _value(column, table.base.cells[index]), name, column.show_change(cell.change)
        )
    others = _ranked([row for row in table.rows if row.role != "merge"], index, column)
    if not others:
        return Markup("")
    return Markup(" against {} for <b>{}</b>, the best of the other models").format(
        _value(column, others[0].cells[index]), others[0].name
    )


def _compare_control(control: Row, best: Cell, index: int, column: Column) -> Markup:
    cell = control.cells[index]
    assert cell.value is not None  # the rows are ranked by these values
    assert best.value is not None
    ahead = cell.value > best.value if column.higher_is_better else cell.value < best.value
    verdict = "is better still" if ahead else "stays behind it"
    if lead_is_small(cell, best, column):
        verdict = "is level with it"
    return Markup(
        "The joint-training control <b>{}</b>, which trained on all the data at once, {}: {}."
    ).format(control.name, verdict, _value(column, cell))


def _without_merges(table: ScoreTable, index: int) -> list[Markup]:
    column = table.columns[index]
    ranked = _ranked(list(table.rows), index, column)
    if not ranked:
        return []
    best, value = ranked[0], _value(column, ranked[0].cells[index])
    if len(ranked) == 1:
        return [Markup("{}, <b>{}</b> has {} {}.").format(_on_split(table), best.name, value, _what(column))]
    lead = Markup("{}, <b>{}</b> has the {} {} of {} models: {}").format(
        _on_split(table), best.name, _most(column), _what(column), len(ranked), value
    )
    if table.base is None:
        return [lead + Markup(". The run has no merge to compare.")]
    if best is table.base:
        return [lead + Markup("; nothing that the run tries beats it.")]
    small = lead_is_small(best.cells[index], table.base.cells[index], column)
    caution = ". That is too little to call from one run." if small else "."
    return [lead + _against(table, index, best.cells[index]) + caution]


def _ranked(rows: list[Row], index: int, column: Column) -> list[Row]:
    known = [(value, row) for row in rows if (value := row.cells[index].value) is not None]
    known.sort(key=lambda pair: pair[0], reverse=column.higher_is_better)
    return [row for _, row in known]


def _on_split(table: ScoreTable) -> str:
    return f"On the {table.split} split" if table.split else "By its scores"


def _most(column: Column) -> str:
    return "highest" if column.higher_is_better else "lowest"


def _what(column: Column) -> str:
    return f"mean {column.metric_words}" if column.task is None else f"{column.metric_words} on {column.task}"


def _value(column: Column, cell: Cell) -> str:
    if cell.value is None:
        return "no value"
    return column.show(cell.value) + (" %" if column.is_share else "")


def _mean(row: Row, indices: list[int]) -> float | None:
    values = [value for index in indices if (value := row.cells[index].value) is not None]
    return sum(values) / len(indices) if len(values) == len(indices) else None


def _check(what: str, before: Cell, after: Cell, column: Column, needed: float) -> Check:
    assert after.change is not None
    unit = "pts" if column.is_share else "%"
    return Check(
        what=what,
        detail=f"{_value(column, before)} → {_value(column, after)}",
        change=column.show_change(after.change),
        needed=f"{'+' if column.higher_is_better else '−'}{100 * needed:.0f} {unit}",
        passed=after.change >= needed,
    )
