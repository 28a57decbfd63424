"""Try options of a merge, score each on calibration, keep the best.

Every trial is one durable line, so a killed search repeats at most the trial it was in. Scores are means over
tasks of one metric; bits and accuracies have no common mean, so a search names tasks of one kind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError
from weightsmith.recipes.stages import scoring
from weightsmith.runs.atomic import append_line, read_lines
from weightsmith.runs.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of options and how it did.

    Attributes:
        options: The options tried.
        score: Mean over the tasks, on calibration.
        metric: What was measured.
        higher_is_better: Its direction.
        tasks: The score on each task.
    """

    options: Mapping[str, Any]
    score: float
    metric: str
    higher_is_better: bool
    tasks: Mapping[str, float]


def run_search(
    grid: Sequence[Mapping[str, Any]],
    page: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    extras: Any,
    work: Path,
    progress: Progress,
) -> list[Trial]:
    """Merge and score every combination of `grid` that an earlier, killed search has not.

    Args:
        grid: The combinations.
        page: The merge page for a combination.
        extras: What to score on: `search_tasks`, `search_characters`, `search_items`, `device`.
        work: Durable scratch folder; the trial's checkpoint in it is deleted in the end.
        progress: Told of each task scored.

    Raises:
        InputError: the tasks have different metrics; or as merging and scoring.
    """
    from weightsmith.evaluation import check_tasks, evaluate
    from weightsmith.merging import merge

    ledger, folder = work / "trials.jsonl", work / "trial"
    trials = [Trial(**line) for line in read_lines(ledger)]
    done = [dict(trial.options) for trial in trials]
    num_tasks = len(scoring.names(extras.search_tasks))
    progress.start("searching", len(grid) * num_tasks, "tasks")
    progress.advance(len(trials) * num_tasks)
    for options in grid:
        if options in done:
            continue
        merge(page(options), folder, device=extras.device, overwrite=True)
        scores = evaluate(
            folder,
            check_tasks(extras.search_tasks),
            "calibration",
            characters=extras.search_characters,
            items=extras.search_items,
            device=extras.device,
            progress=scoring.Within(progress),
        )
        trials.append(_trial(options, scores))
        append_line(ledger, vars(trials[-1]))
    progress.done()
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(trials, key=lambda trial: grid.index(trial.options))


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the best score; of equals the first."""
    sign = 1.0 if trials[0].higher_is_better else -1.0
    return max(trials, key=lambda trial: sign * trial.score)


def _trial(options: Mapping[str, Any], scores: Mapping[str, Any]) -> Trial:
    first_task, first = next(iter(scores.items()))
    for task, score in scores.items():
        if score.metric != first.metric:
            raise InputError(
                f"search_tasks: `{first_task}` is scored in {first.metric}, `{task}` in {score.metric}: "
                "they have no common mean; name tasks of one kind"
            )
    return Trial(
        options=options,
        score=sum(score.value for score in scores.values()) / len(scores),
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        tasks={task: score.value for task, score in scores.items()},
    )
