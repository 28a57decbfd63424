from __future__ import annotations

import os
import subprocess
import sys

import pytest

from weightsmith.recipes import fingerprint
from weightsmith.recipes.fingerprint import code_version
from weightsmith.recipes.stages import KINDS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the house's shape, small enough to edit."""
    root = tmp_path / "weightsmith"
    lazy = "def __getattr__(name):\n    return __import__('weightsmith.merging.' + name)\n"
    merge = "from weightsmith.merging import merge\nfrom weightsmith.recipes.stages import grid\n"
    files = {
        "recipes/stages/train.py": "def run():\n    from weightsmith.training.loop import train\n",
        "recipes/stages/merge.py": merge,
        "recipes/stages/grid.py": "GRID = 1\n",
        "recipes/runner.py": "from weightsmith.reports import page\n",
        "training/__init__.py": "",
        "training/loop.py": "from weightsmith import runs\nfrom weightsmith.errors import InputError\n",
        "training/adagc.py": "X = 1\n",
        "merging/__init__.py": lazy,
        "merging/ties.py": "KEEP = 0.2\n",
        "reports/page.py": "X = 1\n",
        "runs/__init__.py": "X = 1\n",
        "errors.py": "class InputError(Exception):\n    'Wrong input.'\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(fingerprint, "_ROOT", root)

    def versions():
        code_version.cache_clear()
        fingerprint._scan.cache_clear()
        return tuple(code_version(f"weightsmith.recipes.stages.{kind}") for kind in ("train", "merge"))

    yield root, versions
    code_version.cache_clear()
    fingerprint._scan.cache_clear()


@pytest.mark.parametrize(
    ("file", "train_changes", "merge_changes"),
    [
        ("training/loop.py", True, False),
        ("training/adagc.py", True, False),
        ("merging/ties.py", False, True),
        ("recipes/stages/grid.py", False, True),
        ("runs/__init__.py", True, False),
        ("errors.py", True, False),
        ("reports/page.py", False, False),
        ("recipes/runner.py", False, False),
    ],
)
def test_code_counts_for_the_stages_that_can_reach_it(package, file, train_changes, merge_changes):
    root, versions = package
    before = versions()
    with open(root / file, "a") as source:
        source.write("Y = 2\n")
    after = versions()
    assert (before[0] != after[0], before[1] != after[1]) == (train_changes, merge_changes)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("KEEP = 0.2\n", "KEEP = 0.3\n", True),
        ("KEEP = 0.2\n", "KEEP = 0.2  # of the largest\n", False),
        ("KEEP = 0.2\n", '"""About TIES."""\n\nKEEP = (0.2)\n"""Share kept."""\n', False),
    ],
)
def test_only_what_a_file_does_counts_not_how_it_reads(package, old, new, changes):
    root, versions = package
    before = versions()
    (root / "merging" / "ties.py").write_text(new)
    assert (before[1] != versions()[1]) == changes
    assert old != new


def test_a_new_file_of_a_reachable_room_counts(package):
    root, versions = package
    before = versions()
    (root / "merging" / "slerp.py").write_text("X = 1\n")
    assert before[1] != versions()[1]


@pytest.mark.parametrize(
    ("kind", "rooms"),
    [
        ("train", {"training", "testbed", "evaluation", "checkpoints", "tensors", "runs"}),
        # It keeps the zeros of a pruned model, whatever has pruned it.
        ("finetune", {"training", "testbed", "evaluation", "checkpoints", "tensors", "runs"}),
        ("average", {"merging", "training", "testbed", "evaluation", "checkpoints", "tensors", "runs"}),
        ("merge", {"merging", "testbed", "evaluation", "checkpoints", "tensors", "runs"}),
        ("evaluate", {"testbed", "evaluation", "checkpoints", "tensors", "runs"}),
    ],
)
def test_each_kind_reaches_the_rooms_that_decide_its_result_and_no_others(kind, rooms):
    files = fingerprint._reach(KINDS[kind].partition(":")[0])
    parts = [file.relative_to(fingerprint._ROOT).parts for file in files]
    assert {part[0] for part in parts if len(part) > 1} == rooms | {"recipes"}
    assert {part[1] for part in parts if part[0] == "recipes"} == {"stages"}


def test_a_code_version_is_the_same_in_every_process():
    code = (
        "from weightsmith.recipes.fingerprint import code_version\n"
        "from weightsmith.recipes.stages import KINDS\n"
        "print([code_version(target.partition(':')[0]) for target in KINDS.values()])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
