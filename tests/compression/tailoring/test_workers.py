"""What is refused before anything is computed, and workers that fail."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring import evaluator, sources, workers
from weightsmith.compression.tailoring.evaluator import Outcome
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.scoring import FunctionTask
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut
from weightsmith.errors import InputError, MissingExtraError, SystemFault

from ...processes import alive, wait_until
from .made import Likelihood, family

SMALL = {"min_budget": 2, "max_budget": 12, "n_trials": 10, "sparsity": 0.25}


@pytest.fixture
def spawning(monkeypatch):
    """Workers start from nothing, as where they have several threads each."""
    monkeypatch.setattr(workers, "_may_fork", lambda _: False)


@pytest.fixture(params=["forked", pytest.param("spawned", marks=pytest.mark.slow)])
def either_way(request):
    if request.param == "spawned":
        request.getfixturevalue("spawning")


def stored(tmp_path):
    base, candidates = family()
    folders = []
    for name, model in zip(("base", "one", "two"), (base, *candidates), strict=True):
        model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


def test_models_that_do_not_fit_into_memory_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    base, *candidates = stored(tmp_path)
    monkeypatch.setattr(sources, "free_bytes", lambda: 1000)
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(InputError, match=r"pool of 3 models takes .* GB, .* are free: take fewer"):
        TailorSearch(base, candidates, tasks=Likelihood(), device="cpu", **SMALL).run()


def test_a_pool_that_shared_memory_cannot_hold_is_refused(monkeypatch, spawning):
    facts = os.statvfs("/")
    small = os.statvfs_result((*facts[:4], 0, *facts[5:]))
    monkeypatch.setattr(workers.os, "statvfs", lambda _: small)
    monkeypatch.setattr(workers.os.path, "isdir", lambda _: True)
    with pytest.raises(SystemFault, match=r"/dev/shm: 0\.00 GB are free"):
        TailorSearch(family()[0], tasks=Likelihood(), num_workers=2, **SMALL).run()


def test_no_worker_is_refused():
    with pytest.raises(InputError, match="workers: 0"):
        TailorSearch(family()[0], tasks=Likelihood(), num_workers=0, **SMALL).run()


def test_a_function_that_processes_cannot_reach_is_refused(spawning):
    task = FunctionTask("mine", lambda model, indices: [0.5 for _ in indices], 12)
    with pytest.raises(InputError, match="task `mine` can't go to other processes"):
        TailorSearch(family()[0], tasks=task, num_workers=2, **SMALL).run()


def test_a_second_search_in_a_folder_waits_for_the_first(tmp_path, caplog):
    from weightsmith.runs import FolderLock

    search = TailorSearch(*family(), tasks=Likelihood(), work=tmp_path, **SMALL)
    other = threading.Thread(target=search.run)
    with FolderLock(tmp_path):
        other.start()
        while other.is_alive() and "is in use by" not in caplog.text:
            other.join(0.01)
        assert other.is_alive()
        assert not (tmp_path / "trials.jsonl").exists()
    other.join()
    assert (tmp_path / "plan.json").exists()


def until_the_others_are_gone():
    """In the search's own process: its trial ends after those of the others."""
    while multiprocessing.active_children():
        time.sleep(0.01)


def die(model, indices):
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    until_the_others_are_gone()
    return [0.5 for _ in indices]


def test_a_worker_that_dies_is_one_line(either_way):
    search = TailorSearch(*family(), tasks=FunctionTask("mine", die, 12), num_workers=2, **SMALL)
    with pytest.raises(SystemFault, match="a worker of the search died"):
        search.run()


def wrong(model, indices):
    return [7.0 for _ in indices]


def wrong_elsewhere(model, indices):
    if multiprocessing.parent_process() is not None:
        return [7.0 for _ in indices]
    until_the_others_are_gone()
    return [0.5 for _ in indices]


def test_a_wrong_score_in_a_worker_is_the_users_error_here(either_way):
    search = TailorSearch(*family(), tasks=FunctionTask("mine", wrong_elsewhere, 12), num_workers=2, **SMALL)
    with pytest.raises(InputError, match=r"task `mine`: scored 7\.0"):
        search.run()


FORKS = pytest.mark.skipif(sys.platform != "linux", reason="workers fork on Linux only")


@FORKS
def test_forked_workers_have_what_cannot_be_pickled_after_torch_had_several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    matrix = torch.rand(600, 600)
    torch.exp(matrix @ matrix)
    elsewhere = multiprocessing.get_context("fork").Event()

    def score(model, indices):
        if multiprocessing.parent_process() is not None:
            elsewhere.set()
        elsewhere.wait(30)
        torch.exp(matrix @ matrix)
        return [index / 12 for index in indices]

    search = TailorSearch(*family(), tasks=FunctionTask("mine", score, 12), num_workers=2, **SMALL)
    try:
        search.run()
    finally:
        torch.set_num_threads(before)
    assert elsewhere.is_set()
    assert {trial.status for trial in search.trials} <= {"ok", "stopped"}


@FORKS
def test_workers_end_with_a_search_that_is_killed(tmp_path):
    code = f"""
import os, time
from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring.scoring import FunctionTask
from {__package__}.made import family

def score(model, indices):
    open(os.path.join({str(tmp_path)!r}, str(os.getpid())), "w").close()
    time.sleep(60)

TailorSearch(*family(), tasks=FunctionTask("mine", score, 12), num_workers=3, **{SMALL!r}).run()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3]) as search:
        wait_until(lambda: len(os.listdir(tmp_path)) == 3)
        search.kill()
    wait_until(lambda: not any(alive(int(pid)) for pid in os.listdir(tmp_path)))


@FORKS
@pytest.mark.parametrize(
    ("device", "threads", "cuda", "forks"),
    [("cpu", 1, False, True), ("cpu", 2, False, False), ("meta", 1, False, False), ("cpu", 1, True, False)],
)
def test_processes_are_forked_where_torch_survives_it(device, threads, cuda, forks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    pool = SimpleNamespace(device=torch.device(device))
    assert workers._may_fork(SimpleNamespace(pool=pool, num_threads=threads)) is forks


def jobs(count, num_pieces):
    """Trials of so many pieces of one example."""
    parts = [{"a": (place, place + 1)} for place in range(num_pieces)]
    return {number: (Configuration.of(8, [number]), parts, None) for number in range(count)}


@contextmanager
def crew(*scores):
    """Workers that are threads, each with a function of its own in the place of an evaluator."""
    with ThreadPoolExecutor(len(scores)) as executor:
        yield workers._Crew([partial(executor.submit, score) for score in scores])


def test_workers_without_a_trial_of_their_own_take_pieces_of_one_that_runs():
    two_at_once = threading.Barrier(2, timeout=20)

    def score(configuration, spans):
        two_at_once.wait()
        return Outcome("ok", {"a": (spans["a"][0] / 8,)}, 1.0)

    given = jobs(1, 4)
    with crew(score, score) as both:
        assert list(both.outcomes(given, given.get)) == [
            (0, Outcome("ok", {"a": (0, 0.125, 0.25, 0.375)}, 4.0))
        ]


def test_workers_stay_with_their_trials_and_give_their_pieces_in_order():
    seen = {"one": [], "two": []}
    in_step = threading.Barrier(2, timeout=20)

    def score(name, configuration, spans):
        seen[name].append((configuration.dropped[0], spans["a"][0]))
        in_step.wait()
        return Outcome("ok", {"a": (1.0,)})

    given = jobs(4, 3)
    with crew(partial(score, "one"), partial(score, "two")) as both:
        assert sorted(number for number, _ in both.outcomes(given, given.get)) == [0, 1, 2, 3]
    for pieces in seen.values():
        trials = list(dict.fromkeys(number for number, _ in pieces))
        assert pieces == [(number, place) for number in trials for place in range(3)]


def test_a_worker_that_is_not_up_is_not_waited_for():
    given, never = jobs(3, 2), Future()
    with ThreadPoolExecutor(1) as executor:
        alone = workers._Crew(
            [partial(executor.submit, lambda *_: Outcome("ok", {"a": (1.0,)}))], {never: lambda *_: None}
        )
        assert [number for number, _ in alone.outcomes(given, given.get)] == [0, 1, 2]


def test_a_trial_that_is_given_up_takes_its_other_pieces_with_it():
    scored = []

    def score(configuration, spans):
        scored.append(spans["a"])
        return Outcome("ok", {"a": (0.0,)})

    cut = Cut(1, [{"a": 0.5}], {"a": (0.0, 0)}, {"a": 4})
    (configuration, parts, _), given = jobs(1, 4)[0], {}
    given[0] = (configuration, parts, cut)
    with crew(score) as one:
        assert list(one.outcomes(given, given.get)) == [(0, Outcome("stopped", {"a": (0.0, 0.0, 0.0)}))]
    assert scored == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(("at_once", "threads"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_trials_at_the_same_time_share_the_cores(at_once, threads, monkeypatch):
    seen = []

    def look(model, indices):
        seen.append(torch.get_num_threads())
        return [0.5 for _ in indices]

    monkeypatch.setattr(evaluator, "default_threads", lambda _: 4)
    base, candidates = family()
    one = evaluator.Evaluator(
        LayerPool(base, candidates), [FunctionTask("mine", look, 2)], {"mine": [0, 1]}, prefix_bytes=0
    )
    one.at_once = at_once
    before = torch.get_num_threads()
    assert one(Configuration.of(4), {"mine": (0, 2)}).status == "ok"
    assert seen == [threads]
    assert torch.get_num_threads() == before


def test_a_cluster_without_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "weightsmith\[ray\]"'):
        TailorSearch(family()[0], tasks=Likelihood(), ray="auto", **SMALL).run()


def test_a_cluster_finds_what_this_process_finds(monkeypatch):
    ray = pytest.importorskip("ray")
    import weightsmith

    path = [str(Path(weightsmith.__file__).parents[1]), str(Path(__file__).parents[3]), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    base, candidates = family()
    expected = TailorSearch(base, candidates, tasks=Likelihood(), **SMALL)
    plan = expected.run()
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80_000_000)
    try:
        search = TailorSearch(base, candidates, tasks=Likelihood(), num_workers=2, ray="auto", **SMALL)
        assert search.run().configuration == plan.configuration
        assert [trial.costs for trial in search.trials] == [trial.costs for trial in expected.trials]
        broken = TailorSearch(base, candidates, tasks=FunctionTask("mine", wrong, 12), ray="auto", **SMALL)
        with pytest.raises(InputError, match=r"scored 7\.0"):
            broken.run()
    finally:
        ray.shutdown()
