"""One exception tree: every error a user can cause or meet is a single line and carries its exit code.

Bad input (a wrong key, a torn file, shapes that differ) leaves with 2; a fault of the system (disk full,
permission) with 1. Each class also derives from the built-in it stands for, so that code which knows nothing
of this package can catch `ValueError`, `OSError` or `ImportError`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


class WeightsmithError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line leaves with."""

    exit_code = 1


class InputError(WeightsmithError, ValueError):
    """The user's input is wrong: the message names the thing, what was found and what was expected."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder or file can't be read as one, or doesn't fit the others."""


class PageError(InputError):
    """A page of YAML is wrong; the message starts with `file:line: key`."""

    @classmethod
    def at(cls, file: str | Path, line: int | None, key: str, problem: str) -> PageError:
        """The error of one key of a page."""
        place = f"{file}:{line}" if line else str(file)
        return cls(f"{place}: {key}: {problem}" if key else f"{place}: {problem}")


class SystemFault(WeightsmithError, OSError):
    """The machine failed us: no space, no permission, an interrupted device."""


class MissingExtraError(WeightsmithError, ImportError):
    """An optional package is not installed; the message shows the install command."""


def require(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import an optional `module`.

    Raises:
        MissingExtraError: it is not installed; names who asked and `pip install "weightsmith[extra]"`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        root = module.partition(".")[0]
        if missing.name is None or missing.name.partition(".")[0] != root:
            raise
        raise MissingExtraError(
            f'{needed_by} needs {root}, which is not installed: pip install "weightsmith[{extra}]"'
        ) from missing


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean `x`?"` for the closest of `choices`, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""
