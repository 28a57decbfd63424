"""When is a stage the same stage? A fingerprint of its config, its inputs' content, its seed and the code it
can reach.

Content, not history: an input counts by the fingerprint of its files, so a stage that comes out the same when
it is run again leaves everything below it alone. Code counts by room: the stage's own file, and every room of
the package that its imports lead to, followed through the rooms' own imports. Comments, docstrings and layout
don't count, nor do rooms a stage can't reach: work on the report or on the command line retrains nothing.
Versions of other packages are recorded in each checkpoint's lineage but don't count either: an upgrade of
torch should not throw away a week's training unasked.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "weightsmith"
_ROOT = Path(__file__).resolve().parent.parent
# What runs stages but takes no part in what they compute.
_OUTSIDE = frozenset({"cli", "recipes", "reports"})


def digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON value; the order of keys doesn't count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stage_fingerprint(
    *, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], data: str, code: str, seed: int
) -> str:
    """The fingerprint of a stage whose inputs are known by the fingerprints of their content."""
    return digest(
        {
            "kind": kind,
            "config": dict(config),
            "inputs": dict(inputs),
            "data": data,
            "code": code,
            "seed": seed,
        }
    )


@functools.cache
def code_version(module: str) -> str:
    """Stands for all source that the stage in `module` can reach (see the top of this file)."""
    files = sorted(_reach(module))
    return digest({file.relative_to(_ROOT).as_posix(): _scan(file).meaning for file in files})


def file_digest(path: str | Path) -> str:
    """Stands for the content of one file of any kind."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _reach(module: str) -> set[Path]:
    """Source files behind a stage: file by file inside `recipes/stages`, whole rooms below."""
    seen: set[Path] = set()
    rooms: set[str] = set()
    waiting = [_file_of(module)]
    while waiting:
        file = waiting.pop()
        if file is None or file in seen:
            continue
        seen.add(file)
        for name in _scan(file).imports:
            parts = name.split(".")
            if parts[1:3] == ["recipes", "stages"]:
                waiting.append(_file_of(name))
            elif len(parts) > 1 and parts[1] not in _OUTSIDE and parts[1] not in rooms:
                # A room's own doors (registry entries, lazy attributes) are invisible to a reader of imports.
                rooms.add(parts[1])
                room = _ROOT / parts[1]
                waiting += (
                    sorted(room.rglob("*.py")) if room.is_dir() else [_file_of(f"{PACKAGE}.{parts[1]}")]
                )
    return seen


@dataclass(frozen=True)
class _Scan:
    """What is read out of one source file.

    Attributes:
        imports: Modules of this package that it imports anywhere, functions and type-checking blocks
            included.
        meaning: Stands for its program without comments, docstrings and layout.
    """

    imports: frozenset[str]
    meaning: str


@functools.cache
def _scan(file: Path) -> _Scan:
    tree = ast.parse(file.read_bytes())
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from weightsmith import runs` and `from weightsmith.recipes.stages import costs` name modules
            # too.
            imports.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    ours = frozenset(name for name in imports if name.split(".")[0] == PACKAGE)
    return _Scan(ours, hashlib.blake2b(ast.dump(tree).encode(), digest_size=16).hexdigest())


def _file_of(module: str) -> Path | None:
    """The source file of a module of this package; None for a name that is no module (a function, a
    class).
    """
    path = _ROOT.parent.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring, of a definition or of the field above it."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def foreign_source(module: str) -> str:
    """Stands for the source of a module outside this package (a method that another package registers)."""
    spec = importlib.util.find_spec(module)
    return file_digest(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else ""
