"""What was tried and what came of it: a log of one JSON line per trial, from which a search goes on.

The log is the whole state. A search that goes on runs its rules again from the same seed and finds the
answers of earlier trials here instead of computing them, so it asks what an undisturbed one would ask,
whatever the backend. Where it asks in another order all the same (another version of a backend, say), each
trial's answer is still that of its own examples. Scores are kept per example, rounded to six places when they
are made: what is read back is what was used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError
from weightsmith.runs.atomic import append_line, read_lines

FORMAT = 2
PLACES = 6
Status = Literal["ok", "stopped", "nonfinite", "failed"]
_MAY_CHANGE = ("n_trials", "max_failures", "select")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration measured at one budget.

    Attributes:
        id: Its number, given when it was asked for.
        configuration: What was measured.
        budget: Calibration examples of each task, at most.
        costs: 1 - score, by task; 1 where it failed, of what was scored where it was stopped.
        status: `stopped` where it was given up as hopeless, `nonfinite` where logits held NaN or infinity,
            `failed` where it raised.
        seconds: It took.
        error: The traceback of a failed one.
        values: New scores per example, by task: those beyond what a lower budget had measured already.
        starts: Number of the first of them, by task.
    """

    id: int
    configuration: Configuration
    budget: int
    costs: Mapping[str, float]
    status: Status = "ok"
    seconds: float = 0.0
    error: str | None = None
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    starts: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What it is remembered by."""
        return self.configuration.key, self.budget

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "id": self.id,
            "configuration": self.configuration.to_json(),
            "budget": self.budget,
            "costs": dict(self.costs),
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "values": {task: list(values) for task, values in self.values.items()},
            "starts": dict(self.starts),
        }

    def summary(self) -> dict[str, Any]:
        """Plain JSON values without the score of each example."""
        return {key: value for key, value in self.to_json().items() if key not in ("values", "starts")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str) -> Trial:
        """Read back what `to_json` gave.

        Raises:
            InputError: it is no trial; names `source`.
        """
        try:
            found = cls(
                id=int(value["id"]),
                configuration=Configuration.from_json(value["configuration"], source),
                budget=int(value["budget"]),
                costs={str(task): float(cost) for task, cost in value["costs"].items()},
                status=value["status"],
                seconds=float(value["seconds"]),
                error=value["error"],
                values={task: tuple(map(float, given)) for task, given in value["values"].items()},
                starts={task: int(start) for task, start in value["starts"].items()},
            )
            if missing := found.values.keys() - found.starts.keys():
                raise ValueError(f"no start of {', '.join(sorted(missing))}")
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            if isinstance(problem, InputError):
                raise
            raise InputError(f"{source}: not a trial: {problem!r}") from problem
        return found


def lengthened(
    known: tuple[float, ...], start: int, values: tuple[float, ...], source: str = "trials"
) -> tuple[float, ...]:
    """Scores of the first examples, with those from number `start` on, some of which may be known.

    Raises:
        InputError: nothing is known of those in between; names `source`.
    """
    if start > len(known):
        raise InputError(
            f"{source}: scores from example {start} on, but {len(known)} before it: lines are missing"
        )
    return (*known, *values[len(known) - start :])


class TrialLog:
    """The trials of one search, on disk where a file is given.

    Args:
        path: The file; None keeps them in memory only.
        header: What the search was made with. A log with another header is another search's.

    Attributes:
        header: That of the file where it has one: a search that goes on keeps what it began with.
        found: Trials of the file that were made earlier, by configuration and budget; each with the scores
            of all its examples.

    Raises:
        InputError: the file is of another search; names what differs.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.header: dict[str, Any] = {"format": FORMAT, **_plain(header)}
        self.found: dict[tuple[str, int], Trial] = {}
        lines = read_lines(self.path) if self.path else []
        if lines:
            self._check(lines[0])
            known: dict[str, dict[str, tuple[float, ...]]] = {}
            for number, line in enumerate(lines[1:], start=2):
                place = f"{self.path}:{number}"
                trial = Trial.from_json(line, place)
                mine = known.setdefault(trial.configuration.key, {})
                for task, values in trial.values.items():
                    mine[task] = lengthened(mine.get(task, ()), trial.starts[task], values, place)
                self.found[trial.key] = replace(trial, values=dict(mine), starts=dict.fromkeys(mine, 0))
        elif self.path:
            append_line(self.path, self.header)

    def add(self, trial: Trial) -> None:
        """Make a trial durable."""
        if self.path:
            append_line(self.path, trial.to_json())

    def _check(self, header: Any) -> None:
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise InputError(f"{self.path}: not a log of trials (its first line has no format {FORMAT})")
        for key in dict.fromkeys((*self.header, *header)):
            ours, theirs = self.header.get(key), header.get(key)
            if key not in _MAY_CHANGE and ours != theirs:
                raise InputError(
                    f"{self.path}: was made with {key} = {json.dumps(theirs)}, this search has "
                    f"{json.dumps(ours)}; take another folder or the same setting"
                )
        self.header = header


def read_trials(path: str | Path) -> tuple[dict[str, Any], list[Trial]]:
    """The header and the trials of a log, by their numbers.

    Raises:
        InputError: it is no log of trials.
    """
    lines = read_lines(path)
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise InputError(f"{path}: not a log of trials")
    found = [Trial.from_json(line, f"{path}:{number}") for number, line in enumerate(lines[1:], start=2)]
    latest = {trial.key: trial for trial in found}  # a failed one may have been tried again
    return lines[0], sorted(latest.values(), key=lambda trial: trial.id)


def _plain(header: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples are lists."""
    return json.loads(json.dumps(dict(header)))
