"""Three ways to mix data of several objectives (helpful, honest, harmless) into one training set.

Problem  One model is to have several behaviours, each taught by data of its own. Merging trains a model on
         each and joins the weights; mixing joins the data and trains once. These are the mixtures that
         merging is compared with.
Rules    Heuristic   a fixed ratio of tokens between the objectives, equal by default
         ArmoRM      a multi-objective reward model scores each row on every objective; q_o(x) is the row's
                     quantile among all rows, g_o(x) >= 0 its gate;
                       on "all":   score(x) = min of q_o(x) over objectives with g_o(x) > 0
                       on "mean":  score(x) = sum_o g_o(x) q_o(x) / sum_o g_o(x)
                     of each objective's rows the best `keep` stay; `temperature` weighs them by
                     exp(score / temperature)
         Hummer      rows of least conflict stay, conflict(x) = sum_o max(0, -score_o(x)); and between rounds
                     of training the objectives' sampling weights follow what is still lacking:
                       w_o <- w_o exp(rate (target_o - now_o + conflict max(0, before_o - now_o)))
                     brought to sum 1, each at least `floor`
Source   The three arms of Yang et al., arXiv:2502.06876. The names are theirs, after Wang et al.,
         arXiv:2406.12845 (ArmoRM), and Jiang et al., arXiv:2405.11647 (Hummer). RECONSTRUCTED: every rule
         above; neither the paper's text nor code for its arms was at hand.
Scores   Come from the caller: a reward model, or the margin of a reference classifier for each objective
         (say so where you report it). Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from weightsmith.errors import InputError, nearest
from weightsmith.runs.seeds import derive

Row = Mapping[str, Any]
Scorer = Callable[[Sequence[Row]], Sequence[Mapping[str, float]]]
"""Rows -> for each row its score on every objective, higher is better; the same objectives for all rows."""
Gate = Mapping[str, float] | Callable[[Row], Mapping[str, float]]


class Rows(Protocol):
    """A list of rows or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Mixture:
    """Rows to train on, in an order that mixes the objectives.

    Attributes:
        rows: The rows as they were given; `datasets.Dataset.from_list(mixture.rows)` is a data set of them.
        owners: The objective that each row came from.
        weights: Weight of each row in the loss or in sampling, 1 on average.
    """

    rows: list[Row]
    owners: list[str]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, objective: str) -> list[Row]:
        """The rows of one objective."""
        return [row for row, owner in zip(self.rows, self.owners, strict=True) if owner == objective]


def heuristic_mixture(
    sources: Mapping[str, Rows],
    *,
    weights: Mapping[str, float] | None = None,
    total: int | None = None,
    length: Callable[[Row], int] | None = None,
    seed: int = 0,
) -> Mixture:
    """A fixed ratio of tokens between the objectives.

    Args:
        sources: Objective -> its rows.
        weights: Share of each objective in the tokens, in any unit; equal by default.
        total: Tokens in all, at most what the ratio allows without repeating a row, which is the default.
        length: Tokens of a row; by default the characters of all its texts.
        seed: Of the choice of rows and their order.

    Returns:
        Whole rows: an objective has its tokens less those of a row that did not fit, and one row at least.

    Raises:
        InputError: no source, an empty one, a weight that is missing or not positive, a length that is not,
            more tokens than there are.

    Example:
        >>> rows = {"help": [{"text": "abcd"}] * 9, "honest": [{"text": "ab"}] * 6}
        >>> mixture = heuristic_mixture(rows)
        >>> len(mixture.of("help")), len(mixture.of("honest"))
        (3, 6)
    """
    lists = _lists(sources)
    shares = _shares(lists, weights)
    measured = {name: _lengths(name, rows, length or _characters) for name, rows in lists.items()}
    most = min(sum(measured[name]) / share for name, share in shares.items())
    if total is not None and not 0 < total <= most * (1 + 1e-9):
        raise InputError(f"total: expected 1..{int(most)} tokens at these weights, got {total}")
    picked: list[tuple[str, Row]] = []
    for name, rows in lists.items():
        order = np.random.default_rng(derive(seed, "mixture", name)).permutation(len(rows))
        room = (most if total is None else total) * shares[name] * (1 + 1e-9)
        ends = np.cumsum([measured[name][index] for index in order])
        count = max(1, int(np.searchsorted(ends, room, side="right")))
        picked += [(name, rows[index]) for index in order[:count]]
    return _mixed(picked, [1.0] * len(picked), seed)


def armorm_mixture(
    sources: Mapping[str, Rows],
    scorer: Scorer,
    *,
    gate: Gate | None = None,
    on: Literal["all", "mean"] = "all",
    keep: float = 0.5,
    temperature: float | None = None,
    seed: int = 0,
) -> Mixture:
    """Of each objective the rows whose gated reward is best.

    Args:
        sources: Objective -> its rows.
        scorer: The multi-objective reward; called once, with all rows.
        gate: Importance of each of the scorer's objectives, one mapping or one for each row; equal by
            default. What it leaves out counts as 0.
        on: "all": a row is as good as its worst objective; "mean": as its gated mean.
        keep: Share of each source's rows that stay, in (0, 1]; rounded up.
        temperature: Where given, rows that stay are weighted by exp(score / temperature), 1 on average;
            scores lie in 0..1.
        seed: Of the order.

    Raises:
        InputError: no source or an empty one; scores that are missing or not finite; a gate that is negative,
            all 0, or names no objective of the scorer; `keep` or `temperature` out of range.

    Example:
        >>> rows = {"help": [{"n": 1}, {"n": 2}], "honest": [{"n": 3}, {"n": 4}]}
        >>> mixture = armorm_mixture(rows, lambda rows: [{"help": row["n"]} for row in rows])
        >>> sorted(row["n"] for row in mixture.rows)
        [2, 4]
    """
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: expected above 0, got {temperature}")
    if on not in ("all", "mean"):
        raise InputError(f"on: expected all or mean, got {on!r}")
    lists = _lists(sources)
    scores, names = _scored(lists, scorer)
    everything = [row for rows in lists.values() for row in rows]
    gates = _gates(everything, names, gate)
    quantiles = np.stack([_quantiles(scores[:, number]) for number in range(len(names))], axis=1)
    mean = (gates * quantiles).sum(axis=1) / gates.sum(axis=1)
    gated = np.where(gates > 0, quantiles, np.inf).min(axis=1) if on == "all" else mean
    kept = _best(lists, gated, keep)
    weights = np.ones(len(kept))
    if temperature is not None:
        raw = np.exp((gated[[place for _, _, place in kept]] - gated.max()) / temperature)
        weights = raw * len(kept) / raw.sum()
    return _mixed([(name, row) for name, row, _ in kept], weights.tolist(), seed)


def hummer_mixture(
    sources: Mapping[str, Rows], scorer: Scorer, *, keep: float = 0.5, seed: int = 0
) -> Mixture:
    """Of each objective the rows that conflict least with the others.

    Args:
        sources: Objective -> its rows.
        scorer: How far each objective is for a row (above 0) or against it (below), such as the margin of its
            preferred answer; called once, with all rows.
        keep: Share of each source's rows that stay, in (0, 1]; rounded up. Equal rows stay in their order.
        seed: Of the order.

    Raises:
        InputError: no source or an empty one, scores that are missing or not finite, `keep` out of range.

    Example:
        >>> rows = {"help": [{"n": -2.0}, {"n": 1.0}]}
        >>> hummer_mixture(rows, lambda rows: [{"harmless": row["n"]} for row in rows]).rows
        [{'n': 1.0}]
    """
    lists = _lists(sources)
    scores, _ = _scored(lists, scorer)
    kept = _best(lists, -np.maximum(0.0, -scores).sum(axis=1), keep)
    return _mixed([(name, row) for name, row, _ in kept], [1.0] * len(kept), seed)


def hummer_weights(
    weights: Mapping[str, float],
    now: Mapping[str, float],
    before: Mapping[str, float] | None = None,
    *,
    target: float | Mapping[str, float] = 1.0,
    rate: float = 1.0,
    conflict: float = 1.0,
    floor: float = 0.05,
) -> dict[str, float]:
    """The objectives' sampling weights for the next round of training.

    Args:
        weights: Of the round that ended, in any unit; positive.
        now: Held-out score of each objective after it, higher is better. Not of the test data.
        before: The same before it; what fell since is in conflict with what rose and gets more.
        target: Score that asks for no more, one number or one for each objective.
        rate: Strength; 0 leaves the weights as they are.
        conflict: How much a fall counts beside a lack.
        floor: Least weight of each objective, in [0, 1 / their number).

    Returns:
        Objective -> weight; their sum is 1.

    Raises:
        InputError: objectives that differ, weights that are not positive, numbers out of range.

    Example:
        >>> weights = hummer_weights({"help": 1, "honest": 1}, {"help": 1.0, "honest": 0.0}, rate=1.0986123)
        >>> {name: round(weight, 4) for name, weight in weights.items()}
        {'help': 0.275, 'honest': 0.725}
    """
    shares = _shares(weights, weights)
    for key, given in (("now", now), ("before", before), ("target", target)):
        if isinstance(given, Mapping):
            _same_objectives(key, shares, given)
    for key, value in (("rate", rate), ("conflict", conflict)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{key}: expected 0 or more, got {value}")
    if not 0 <= floor * len(shares) < 1:
        raise InputError(f"floor: expected in [0, {1 / len(shares):.3g}), got {floor}")
    goal = dict(target) if isinstance(target, Mapping) else dict.fromkeys(shares, target)
    fell = {name: max(0.0, (before or now)[name] - now[name]) for name in shares}
    powers = {name: rate * (goal[name] - now[name] + conflict * fell[name]) for name in shares}
    if not all(map(math.isfinite, powers.values())):
        raise InputError(f"hummer_weights: scores and targets must be finite, got {dict(now)}")
    highest = max(powers.values())
    raw = {name: share * math.exp(powers[name] - highest) for name, share in shares.items()}
    rest, whole = 1 - floor * len(shares), sum(raw.values())
    return {name: floor + rest * value / whole for name, value in raw.items()}


# ---- shared steps


def _lists(sources: Mapping[str, Rows]) -> dict[str, list[Row]]:
    if not sources:
        raise InputError("mixture: no objective, expected at least one with rows")
    lists = {name: [rows[index] for index in range(len(rows))] for name, rows in sources.items()}
    for name, rows in lists.items():
        if not rows:
            raise InputError(f"mixture: objective `{name}` has no rows")
    return lists


def _same_objectives(key: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{key}: no objective `{name}`{nearest(name, known)}; known: {', '.join(known)}")
    for name in known:
        if name not in given:
            raise InputError(f"{key}: objective `{name}` is missing; given: {', '.join(given)}")


def _shares(known: Mapping[str, Any], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights brought to sum 1, in the order of `known`."""
    weights = dict.fromkeys(known, 1.0) if weights is None else weights
    _same_objectives("weights", known, weights)
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"weights: `{name}` must be above 0, got {weight}")
    whole = sum(weights.values())
    return {name: weights[name] / whole for name in known}


def _lengths(name: str, rows: Sequence[Row], length: Callable[[Row], int]) -> list[int]:
    found = [length(row) for row in rows]
    for index, tokens in enumerate(found):
        if not tokens > 0:
            raise InputError(f"mixture: row {index} of `{name}` has length {tokens}, expected above 0")
    return found


def _characters(value: Any) -> int:
    """Characters of all texts inside, whatever the nesting."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _scored(lists: Mapping[str, list[Row]], scorer: Scorer) -> tuple[np.ndarray, list[str]]:
    """Scores of all rows (rows, objectives), fp64, and the scorer's objectives."""
    rows = [row for listed in lists.values() for row in listed]
    found = list(scorer(rows))
    if len(found) != len(rows):
        raise InputError(f"scorer: gave {len(found)} scores for {len(rows)} rows")
    names = list(found[0])
    if not names:
        raise InputError("scorer: row 0 has no score, expected one for each objective")
    for index, scores in enumerate(found):
        if set(scores) != set(names):
            raise InputError(
                f"scorer: row {index} has scores {sorted(scores)}, the first has {sorted(names)}"
            )
    values = np.array([[scores[name] for name in names] for scores in found], float)
    if not np.isfinite(values).all():
        row, number = np.argwhere(~np.isfinite(values))[0]
        raise InputError(f"scorer: row {row} scored {values[row, number]} on `{names[number]}`")
    return values, names


def _gates(rows: Sequence[Row], names: Sequence[str], gate: Gate | None) -> np.ndarray:
    """Gates of all rows (rows, objectives)."""
    if gate is None:
        return np.ones((len(rows), len(names)))
    given = [gate(row) for row in rows] if callable(gate) else [gate] * len(rows)
    for index, each in enumerate(given):
        for name, value in each.items():
            if name not in names:
                raise InputError(
                    f"gate: the scorer has no objective `{name}`{nearest(name, names)}; "
                    f"known: {', '.join(names)}"
                )
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"gate: `{name}` of row {index} is {value}, expected 0 or more")
        if not any(each.values()):
            raise InputError(f"gate: row {index} gates every objective to 0")
    return np.array([[each.get(name, 0.0) for name in names] for each in given], float)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Where each value stands among all, in 0..1: (values below + half of the equal ones) / all."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (below + upto) / (2 * len(values))


def _best(lists: Mapping[str, list[Row]], score: np.ndarray, keep: float) -> list[tuple[str, Row, int]]:
    """The best share of each objective's rows: (objective, row, its place among all rows)."""
    if not 0 < keep <= 1:
        raise InputError(f"keep: expected in (0, 1], got {keep}")
    found, first = [], 0
    for name, rows in lists.items():
        order = np.argsort(-score[first : first + len(rows)], kind="stable")
        count = math.ceil(keep * len(rows) - 1e-9)
        found += [(name, rows[index], first + int(index)) for index in order[:count]]
        first += len(rows)
    return found


def _mixed(picked: Sequence[tuple[str, Row]], weights: Sequence[float], seed: int) -> Mixture:
    order = np.random.default_rng(derive(seed, "mixture order")).permutation(len(picked))
    return Mixture(
        rows=[picked[index][1] for index in order],
        owners=[picked[index][0] for index in order],
        weights=[weights[index] for index in order],
    )
