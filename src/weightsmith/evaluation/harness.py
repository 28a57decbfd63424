"""Tasks of lm-evaluation-harness by name, scored by its own prompts, filters and metrics.

    lm_eval:arc_easy                                a task, group or tag of the harness
    lm_eval:arc_easy@acc                            by this metric
    lm_eval:gsm8k@exact_match,flexible-extract      by this metric behind this filter, as it prints them
    lm_eval:pages/colours                           the task `colours` of the pages in the folder `pages`

The harness reads pages and data and makes prompts, once; a model that is in memory answers them, all or some;
the harness filters the answers and gives a number for each question. A group is one task: its questions are
those of all its subtasks, and its score is the mean over them.

Which questions  `test` is what the harness itself scores: the test split, or the validation split where there
                 is none. `calibration` is another one: validation, else training. A task that has one split
                 only gives that, with a warning: what is chosen on it can't be reported on it.
Metric           Without one, the first of `acc_norm`, `acc`, `exact_match` that all subtasks have, else the
                 first they have in common.
Source           lm_eval 0.4.13 (`TaskManager.load`, `Task.construct_requests`, `Task.process_results`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from weightsmith.errors import InputError, nearest, require
from weightsmith.evaluation.score import Score
from weightsmith.testbed.domains import Split

log = logging.getLogger(__name__)

PREFIX = "lm_eval:"
_PREFERRED = ("acc_norm", "acc", "exact_match")
_FEWSHOT_SEED = 1234  # the harness's own, so that our prompts are its prompts


class Name(NamedTuple):
    """What a task's name says.

    Attributes:
        folder: Of pages; None for the harness's own.
        task: Task, group or tag.
        metric: None for the default.
        filter: None for the first.
    """

    folder: str | None
    task: str
    metric: str | None
    filter: str | None

    @classmethod
    def of(cls, text: str) -> Name:
        """Read `lm_eval:[FOLDER/]TASK[@METRIC[,FILTER]]`.

        Example:
            >>> Name.of("lm_eval:pages/colours@exact_match,strict")
            Name(folder='pages', task='colours', metric='exact_match', filter='strict')
        """
        folder, slash, rest = text.removeprefix(PREFIX).rpartition("/")
        task, _, measure = rest.partition("@")
        metric, _, chosen = measure.partition(",")
        return cls((folder or "/") if slash else None, task, metric or None, chosen or None)


def check(text: str, num_fewshot: int | None) -> None:
    """Raise what can be known before data and models are loaded.

    Raises:
        InputError: no such task, group, tag or folder.
        MissingExtraError: lm_eval is not installed.
    """
    name = Name.of(text)
    known = _index(name, text)
    if name.task not in known:
        where = f" in {name.folder}" if name.folder else " of lm-evaluation-harness"
        raise InputError(f"task `{text}`: no task or group `{name.task}`{where}{nearest(name.task, known)}")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"task `{text}`: num_fewshot must be at least 0, got {num_fewshot}")


def local_files(text: str) -> list[Path]:
    """Pages, code and data on this machine that a task of a folder is made of."""
    name = Name.of(text)
    if name.folder is None:
        return []
    found = [path for kind in ("*.yaml", "*.py") for path in Path(name.folder).rglob(kind)]
    for page in _index(name, text).values():
        found += _paths(((page.cfg or {}).get("dataset_kwargs") or {}).get("data_files"))
    return sorted(set(found))


def version() -> str:
    """Of the harness.

    Raises:
        MissingExtraError: it is not installed.
    """
    return str(_library("a task of lm-evaluation-harness").__version__)


@dataclass(frozen=True)
class _Question:
    leaf: int
    document: Any
    requests: tuple[Any, ...]
    """The harness's instances, unanswered."""


class HarnessQuestions:
    """The questions of one task as prompts, and the metric they are scored by.

    Args:
        text: The task's name.
        split: Which questions; see the module.
        limit: Of each subtask the first so many.
        most: So many of all, spread evenly over the subtasks.
        num_fewshot: Examples before a question; None for what the page says.

    Attributes:
        metric: As the harness calls it.
        strata: The subtask of each question.

    Raises:
        InputError: unknown task, metric or filter; data that can't be loaded; a task of another kind.
        MissingExtraError: lm_eval is not installed.
    """

    def __init__(
        self,
        text: str,
        split: Split = "test",
        *,
        limit: int | None = None,
        most: int | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        check(text, num_fewshot)
        self.text, name = text, Name.of(text)
        with _quiet():
            self._leaves = _load(name, text)
            for leaf in self._leaves:
                _set_shots(leaf, text, num_fewshot)
            self.metric = _metric(self._leaves, name.metric, text)
            self._filters = [_filter(leaf, name.filter, text) for leaf in self._leaves]
            documents = [_documents(leaf, split, text) for leaf in self._leaves]
            sizes = [min(len(found), limit or len(found)) for found in documents]
            self._questions = [
                _question(place, leaf, documents[place][number], number, text)
                for place, (leaf, chosen) in enumerate(zip(self._leaves, _spread(sizes, most), strict=True))
                for number in chosen
            ]
        if not self._questions:
            raise InputError(f"task `{text}`: has no questions")
        self.strata = [self._leaves[question.leaf].task_name for question in self._questions]

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def higher_is_better(self) -> bool:
        """The direction of the metric."""
        return bool(self._leaves[0].higher_is_better().get(self.metric, True))

    @property
    def is_mean(self) -> bool:
        """Whether the task's score is the mean of its questions'."""
        mean = _library(self.text, "api.registry").get_aggregation("mean")
        return all(leaf.aggregation().get(self.metric, mean) is mean for leaf in self._leaves)

    def digest(self) -> str:
        """Stands for all prompts and for what is measured."""
        asked = [request.arguments for question in self._questions for request in question.requests]
        filters = [chosen.name for chosen in self._filters]
        return hashlib.blake2b(repr((self.metric, filters, asked)).encode(), digest_size=8).hexdigest()

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """Of each question the first of its requests as one text, its answer included where it has one."""
        first = [self._questions[index].requests[0].arguments for index in indices]
        return ["".join(part for part in given if isinstance(part, str)) for given in first]

    def values(
        self, model: Any, tokenizer: Any, indices: Sequence[int], batch_size: int | None = None
    ) -> list[Any]:
        """What the harness's metric gives for each of the questions, before they are put together.

        Raises:
            InputError: the model is too short for a page's `max_gen_toks`.
            NonFiniteError: logits held NaN.
        """
        _library(self.text)
        from weightsmith.evaluation.harness_model import answer

        asked = [
            [replace(request, resps=[], filtered_resps={}) for request in self._questions[index].requests]
            for index in indices
        ]
        with _quiet():
            answer(model, tokenizer, [one for requests in asked for one in requests], self.text, batch_size)
            for place, chosen in enumerate(self._filters):
                mine = [
                    one
                    for index, requests in zip(indices, asked, strict=True)
                    for one in requests
                    if self._questions[index].leaf == place
                ]
                if mine:
                    chosen.apply(mine)
            return [self._value(index, requests) for index, requests in zip(indices, asked, strict=True)]

    def score(self, model: Any, tokenizer: Any, batch_size: int | None = None) -> Score:
        """The task's score, put together as the harness does it; of a group the mean over its questions."""
        values = self.values(model, tokenizer, range(len(self)), batch_size)
        total = 0.0
        for place, leaf in enumerate(self._leaves):
            mine = [value for value, one in zip(values, self._questions, strict=True) if one.leaf == place]
            if mine:
                together = leaf.aggregation().get(self.metric) or _mean
                total += len(mine) * float(together(mine))
        return Score(self.metric, total / len(values), self.higher_is_better, len(values))

    def _value(self, index: int, requests: Sequence[Any]) -> Any:
        question = self._questions[index]
        chosen = self._filters[question.leaf].name
        ordered = sorted(requests, key=lambda request: request.idx)
        leaf = self._leaves[question.leaf]
        found = leaf.process_results(question.document, [one.filtered_resps[chosen] for one in ordered])
        if self.metric not in found:
            known = ", ".join(found)
            raise InputError(f"task `{self.text}`: gives no metric `{self.metric}`; it gives {known}")
        return found[self.metric]


def _library(text: str, module: str = "") -> Any:
    needed_by = f"task `{text}`" if text.startswith(PREFIX) else text
    return require(f"lm_eval.{module}" if module else "lm_eval", extra="eval", needed_by=needed_by)


@lru_cache(maxsize=1)
def _own_pages() -> Any:
    """The manager of the harness's own pages: reading fifteen thousand of them takes seconds."""
    return _library("a task of lm-evaluation-harness", "tasks").TaskManager()


def _manager(name: Name, text: str) -> Any:
    tasks = _library(text, "tasks")
    if name.folder is None:
        return _own_pages()
    if not Path(name.folder).is_dir():
        raise InputError(f"task `{text}`: no folder `{name.folder}`; expected one with pages of tasks")
    return tasks.TaskManager(include_path=name.folder, include_defaults=False)


def _index(name: Name, text: str) -> Mapping[str, Any]:
    _library(text, "tasks")
    with _quiet():
        return _manager(name, text).task_index


def _load(name: Name, text: str) -> list[Any]:
    """The subtasks, in the harness's order."""
    try:
        leaves = list(_manager(name, text).load(name.task)["tasks"].values())
    except (InputError, ImportError):
        raise
    except Exception as problem:  # what pages and hubs raise has no common type
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(f"task `{text}`: its page or its data can't be loaded: {first}") from problem
    for leaf in leaves:
        if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
            kind = "runs code that a model writes" if getattr(leaf, "UNSAFE_CODE", False) else "is not text"
            raise InputError(f"task `{text}`: `{leaf.task_name}` {kind}; run it with lm_eval itself")
    return leaves


def _set_shots(leaf: Any, text: str, count: int | None) -> None:
    said = leaf.get_config("num_fewshot")
    if count is not None and said == 0 and count > 0:
        raise InputError(f"task `{text}`: the page of `{leaf.task_name}` fixes num_fewshot at 0, got {count}")
    leaf.set_config("num_fewshot", said or 0 if count is None else count)
    leaf.set_fewshot_seed(_FEWSHOT_SEED)


def _metric(leaves: Sequence[Any], wanted: str | None, text: str) -> str:
    common = [one for one in leaves[0].aggregation() if all(one in leaf.aggregation() for leaf in leaves)]
    if wanted is not None:
        # A metric with several results, such as pass@k, is known by one name and gives others.
        if wanted not in common and "@" not in wanted:
            raise InputError(
                f"task `{text}`: no metric `{wanted}`; expected one of {', '.join(common) or 'none'}"
            )
        return wanted
    found = next((one for one in (*_PREFERRED, *common) if one in common), None)
    if found is None:
        raise InputError(f"task `{text}`: its subtasks have no metric in common; name one of them alone")
    return found


def _filter(leaf: Any, wanted: str | None, text: str) -> Any:
    known = {found.name: found for found in leaf._filters}
    if wanted is not None and wanted not in known:
        raise InputError(f"task `{text}`: no filter `{wanted}`; expected one of {', '.join(known)}")
    return known[wanted] if wanted is not None else next(iter(known.values()))


def _documents(leaf: Any, split: Split, text: str) -> Any:
    if split == "test":
        return leaf.eval_docs
    for has, name in ((leaf.has_validation_docs, "validation"), (leaf.has_training_docs, "training")):
        if has() and (name == "training" or leaf.has_test_docs()):
            # To the harness this is the split that is scored now: no question may be its own example.
            drawn_from = "training" if leaf.has_training_docs() else name
            leaf.config.test_split = leaf.get_config(f"{name}_split")
            if leaf.fewshot_cfg.split is None and drawn_from == name:
                leaf.fewshot_cfg.split = leaf.config.test_split
            return leaf.validation_docs() if name == "validation" else leaf.training_docs()
    log.warning(
        "task `%s`: `%s` has one set of questions; what is chosen on it can't be reported on it",
        text,
        leaf.task_name,
    )
    return leaf.eval_docs


def _question(place: int, leaf: Any, document: Any, number: int, text: str) -> _Question:
    context = leaf.fewshot_context(
        document, num_fewshot=leaf.get_config("num_fewshot"), gen_prefix=leaf.doc_to_prefix(document)
    )
    made = leaf.construct_requests(
        doc=document, ctx=context, metadata=(leaf.task_name, number, leaf.get_config("repeats") or 1)
    )
    return _Question(place, document, tuple(made) if isinstance(made, list) else (made,))


def _spread(sizes: Sequence[int], most: int | None) -> list[list[int]]:
    """Numbers of the questions of each subtask, ascending: all, or `most` of them, evenly."""
    if most is None or sum(sizes) <= most:
        return [list(range(size)) for size in sizes]
    rng = random.Random(0)
    placed = [
        ((rank + 0.5) / size, place, number)
        for place, size in enumerate(sizes)
        for rank, number in enumerate(rng.sample(range(size), size))
    ]
    chosen = sorted(placed)[:most]
    return [sorted(number for _, at, number in chosen if at == place) for place in range(len(sizes))]


def _paths(value: Any) -> list[Path]:
    """Files of this machine in what a page gives as `data_files`."""
    if isinstance(value, str):
        return [Path(value)] if Path(value).is_file() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [path for one in inner for path in _paths(one)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and `datasets` draw bars and talk much; errors still come through."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
