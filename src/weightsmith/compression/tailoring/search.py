"""GPTailor: a smaller model out of the layers of a base and its fine-tunes, found by search and without
training.

Problem  A decoder is to lose a share of its layers. Which ones, and whose layer stands in each place that is
         left, can only be measured: by a few calibration tasks, on hundreds of combinations.
Method   Layers of all models stay resident (`pool`), so a combination is a list of references and is measured
         as it is; rungs of more and more examples sort out the bad ones early (`backends`); every trial is
         one line of a log (`trials`), from which a killed search goes on and finds what an undisturbed one
         finds.
Source   arXiv:2506.20480. Confirmed by public code: space, blends, starts, ParEGO, Hyperband, budgets. Ours:
         how a bracket is filled where SMAC is not asked (`evolution`), nested examples, the choice of the
         reported plan.
Cost     Trials x (examples x forward pass + blends that are new). No file is written but the log.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from weightsmith.compression.tailoring import ranks
from weightsmith.compression.tailoring.backends import Backend, History, Racing, Sampler
from weightsmith.compression.tailoring.baselines import block_influence
from weightsmith.compression.tailoring.book import Book, TailorError
from weightsmith.compression.tailoring.designs import starts
from weightsmith.compression.tailoring.evaluator import Evaluator
from weightsmith.compression.tailoring.evolution import Evolution
from weightsmith.compression.tailoring.objective import choose, pareto
from weightsmith.compression.tailoring.options import TailorOptions
from weightsmith.compression.tailoring.plan import Point, TailorPlan
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.scoring import Task, equal_rows, example_order
from weightsmith.compression.tailoring.smac import SMAC
from weightsmith.compression.tailoring.sources import Member, Source, members, open_pool, sampled
from weightsmith.compression.tailoring.space import Configuration, Space, num_dropped
from weightsmith.compression.tailoring.tasks import calibration_tasks
from weightsmith.compression.tailoring.tpe import TPE
from weightsmith.compression.tailoring.trials import Trial, TrialLog
from weightsmith.compression.tailoring.workers import Workers, workers
from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig
from weightsmith.evaluation.models import position_limit
from weightsmith.runs.locks import FolderLock
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive

log = logging.getLogger(__name__)

LOG_FILE, PLAN_FILE = "trials.jsonl", "plan.json"
_INFLUENCE_EXAMPLES = 32
_FRUITLESS = 100
"""Proposals in a row that are known already, after which a backend is taken to have nothing left: one of
twelve of SMAC's is drawn at random, and each takes it a third of a second.
"""


class TailorSearch:
    """A search for a tailored model.

    Args:
        base: Folder, hub id, or loaded model.
        candidates: K fine-tunes of it; none for the removal of layers alone.
        tasks: What to score on: what `weightsmith.evaluation.evaluate` takes, or tasks of your own
        (`scoring.Task`).
        tokenizer: Of a loaded base; that of the folder otherwise.
        work: Folder of the log and the plan; a search that was begun there goes on. None keeps all in memory.
        num_workers: Trials at once, all but one in processes of their own. The outcome does not depend on it.
            In a process group of several ranks, of which each makes the search, there is one trial at a time:
            they share its examples, and the first one has the log.
        ray: Compute on a Ray cluster instead: "auto", "local" or HOST:PORT.
        device: For models that are loaded here.
        dtype: For models that are loaded here: "auto" or a torch dtype's name.
        choose_by: Chooses among the Pareto set in the place of `select`: from the list of trials to a place
        in it.
        progress: Told about each trial.
        **options: The fields of `TailorOptions`.

    Example:
        >>> search = TailorSearch(base, [code, english], tasks=["source", "docs"], sparsity=0.25)
        >>> search.run().save_pretrained("smaller")
    """

    def __init__(
        self,
        base: Source,
        candidates: Sequence[Source] = (),
        *,
        tasks: str | TaskConfig | Task | Sequence[str | TaskConfig | Task],
        tokenizer: Any = None,
        work: str | Path | None = None,
        num_workers: int = 1,
        ray: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        choose_by: Callable[[Sequence[Trial]], int] | None = None,
        progress: Progress = SILENT,
        **options: Any,
    ) -> None:
        try:
            self.options = TailorOptions(**options)
        except TypeError as problem:
            raise InputError(f"TailorSearch: {str(problem).rpartition('() ')[2]}") from problem
        self._sources = (base, *candidates)
        self._tasks, self._tokenizer = tasks, tokenizer
        self._work = Path(work) if work is not None else None
        self._num_workers, self._ray, self._device, self._dtype = num_workers, ray, device, dtype
        self._choose_by, self._progress = choose_by, progress
        self.trials: list[Trial] = []
        """Those that count, in the order in which they were asked for."""

    def run(self) -> TailorPlan:
        """Search, or go on with a search.

        Returns:
            The chosen plan, with the Pareto set beside it; it lies in the work folder too.

        Raises:
            CheckpointError: a model can't be read, or is quantised.
            InputError: wrong options, models that don't fit, a score outside of 0..1.
            MissingExtraError: the optimiser is not installed.
            TailorError: all trials failed, or too many by one kind of error.
        """
        rank, world = ranks.place()
        # Two searches in one folder would mix their logs; the second waits and finds the first one's plan.
        with FolderLock(self._work) if self._work is not None and rank == 0 else nullcontext():
            return self._run(rank, world)

    def _run(self, rank: int, world: int) -> TailorPlan:
        base, *candidates = self._sources
        known = members(base, candidates)
        options = self.options
        pool, words = open_pool(
            base,
            candidates,
            edge=options.edge,
            cache_bytes=options.blend_cache_bytes,
            device=self._device,
            dtype=self._dtype,
        )
        space = Space(
            depth=pool.depth,
            num_dropped=num_dropped(pool.depth, options.sparsity, options.keep_layers),
            num_candidates=len(candidates),
            low=options.lambda_range[0],
            high=options.lambda_range[1],
            merge=bool(options.merge_methods),
        )
        tokenizer = self._tokenizer if self._tokenizer is not None else words
        tasks = calibration_tasks(
            self._tasks, tokenizer, pool.base.config.to_dict(), examples=options.max_budget
        )
        dense = pool.assemble(Configuration.of(pool.depth))
        tasks = [task.prepare(dense) for task in tasks]
        orders = {task.name: example_order(task, options.seed) for task in tasks}
        rungs = self._rungs(tasks)
        header = {
            "method": "gptailor",
            "models": [
                [member.name, member.fingerprint or sampled(source)]
                for member, source in zip(known, self._sources, strict=True)
            ],
            "tasks": [
                [task.name, task.size, *([task.digest] if hasattr(task, "digest") else [])] for task in tasks
            ],
            "dtype": str(pool.base.dtype),
            **asdict(options),
        }
        for word in ("blend_cache_bytes", "prefix_cache_bytes"):  # cost time only
            del header[word]
        evaluator = Evaluator(pool, tasks, orders, options.prefix_cache_bytes)
        if rank > 0:
            plan, self.trials = ranks.follow(evaluator)
            return replace(plan, sources=self._sources)
        with ranks.leading() if world > 1 else nullcontext():
            trial_log = TrialLog(self._work / LOG_FILE if self._work else None, header)
            backend = self._backend(space, tasks, rungs, orders, pool, trial_log.header["n_trials"])
            with workers(evaluator, self._num_workers, self._ray) as crew:
                book = Book(
                    tasks, trial_log, rungs, max_failures=options.max_failures, early_stop=options.early_stop
                )
                # A space that is small is spent before the trials are; SMAC would go on to ask what is known.
                most = min(options.n_trials, space.size * len(rungs))
                self._search(backend, crew, book, most)
            # The starts and SMAC keep to the number that the search began with.
            settings = {**header, "planned": trial_log.header["n_trials"]}
            plan = self._plan(known, settings, pool)
            if self._work is not None:
                plan.save(self._work / PLAN_FILE)
        if world > 1:
            ranks.finish((replace(plan, sources=None), self.trials))
        return plan

    def _rungs(self, tasks: Sequence[Task]) -> tuple[int, ...]:
        """Budgets; clamped where there are fewer examples."""
        largest = max(task.size for task in tasks)
        for task in tasks:
            if task.size < self.options.max_budget:
                log.warning(
                    "task `%s` has %d calibration examples, fewer than max_budget %d: all of them are used",
                    task.name,
                    task.size,
                    self.options.max_budget,
                )
        return self.options.rungs(largest)

    def _backend(
        self,
        space: Space,
        tasks: Sequence[Task],
        rungs: Sequence[int],
        orders: dict[str, list[int]],
        pool: LayerPool,
        planned: int,
    ) -> Backend:
        """Who decides; `planned` is the number of trials that the search began with."""
        options = self.options
        influences = []
        positions = position_limit(pool.base)
        rows = [
            # From the left, as lm-evaluation-harness cuts what it scores.
            row[-positions:] if positions else row
            for task in tasks
            if options.seeds == "all" and hasattr(task, "token_rows")
            for row in task.token_rows(orders[task.name][:_INFLUENCE_EXAMPLES])
        ]
        if batches := equal_rows(rows):
            whole = range(space.depth)
            influences = [
                block_influence(
                    pool.assemble(
                        Configuration.of(space.depth, (), dict.fromkeys(whole, (number,) if number else ()))
                    ),
                    batches,
                )
                for number in range(1 + space.num_candidates)
            ]
        first = starts(space, influences, limit=max(1, int(options.start_share * planned)))
        if options.optimizer == "smac":
            return SMAC(
                space,
                [task.name for task in tasks],
                first,
                rungs,
                n_trials=planned,
                eta=options.eta,
                at_once=options.generation,
                rho=options.rho,
                seed=derive(options.seed, "smac"),
            )
        history = History()
        rng = random.Random(derive(options.seed, "proposals"))
        select = self._choose_by or options.select
        sampler: Sampler = Evolution(
            space,
            history,
            rng,
            select=select,
            rho=options.rho,
            fresh_only=options.optimizer != "evolution",
        )
        if options.optimizer == "optuna":
            sampler = TPE(space, history, sampler, len(tasks), derive(options.seed, "optuna"))
        return Racing(
            sampler,
            history,
            first if options.optimizer != "random" else [],
            rungs,
            rng=random.Random(derive(options.seed, "weights")),
            select=select,
            eta=options.eta,
            rho=options.rho,
            generation=options.generation,
        )

    def _search(self, backend: Backend, crew: Workers, book: Book, most: int) -> None:
        """Ask, measure, tell; until there are `most` trials or there is nothing new to ask."""
        self._progress.start("tailoring", most, "trials")
        fruitless = 0
        while len(book.trials) < most and fruitless < _FRUITLESS:
            asked = backend.ask()
            if not asked:
                break
            before = len(book.trials)
            new = book.begin(asked, most)
            for number, outcome in crew.outcomes(new, book.job):
                book.take(number, outcome)
            self._progress.advance(len(book.trials) - before)
            answers = book.answers(asked)
            if answers is None:
                break  # the last trial fell into the middle of what was asked
            backend.tell(answers)
            fruitless = 0 if len(book.trials) > before else fruitless + len(asked)
        self._progress.done()
        self.trials = sorted(book.trials.values(), key=lambda trial: trial.id)

    def _plan(self, known: Sequence[Member], settings: dict[str, Any], pool: LayerPool) -> TailorPlan:
        sound = [trial for trial in self.trials if trial.status == "ok"]
        if not sound:
            errors = list(dict.fromkeys(trial.error or trial.status for trial in self.trials))[:3]
            raise TailorError(f"all {len(self.trials)} trials failed:\n" + "\n".join(errors))
        budget = max(trial.budget for trial in sound)
        top = [trial for trial in sound if trial.budget == budget]
        chosen = choose(top, self._choose_by or self.options.select)
        front = [top[place] for place in pareto([list(trial.costs.values()) for trial in top])]
        return TailorPlan(
            configuration=chosen.configuration,
            models=tuple(known),
            edge=self.options.edge,
            costs=dict(chosen.costs),
            budget=budget,
            front=tuple(
                Point(trial=trial.id, configuration=trial.configuration, costs=dict(trial.costs))
                for trial in front
            ),
            settings={**settings, "trial": chosen.id, "trials": len(self.trials)},
            num_parameters=pool.num_parameters(chosen.configuration),
            base_parameters=pool.num_parameters(Configuration.of(pool.depth)),
            sources=self._sources,
        )
