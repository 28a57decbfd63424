"""The `weightsmith` program: its commands, its errors and warnings as one line each, its exit codes.

Exit codes: 0 done, 1 the machine or a stage failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from weightsmith import __version__
from weightsmith.errors import WeightsmithError

COMMANDS = (
    "run",
    "merge",
    "average",
    "tailor",
    "prune",
    "stats",
    "evaluate",
    "inspect",
    "trace",
    "report",
    "evidence",
    "methods",
)
"""Modules of this room, in the order of the help; each has a function `register` that adds one command."""


class Interrupted(WeightsmithError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # what shells give a program that SIGINT ended


class _Program(TyperGroup):
    """Imports a command when it is asked for: all together take as long as planning a merge."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # All for a wrong name: the nearest is then suggested.
        for name in (cmd_name,) if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                alone = typer.Typer(add_completion=False, rich_markup_mode=None)
                importlib.import_module(f"weightsmith.cli.{name}").register(alone)
                self.commands[name] = get_command(alone)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would leave without a word
            raise Interrupted("interrupted; run the same command again to go on") from None


app = typer.Typer(
    name="weightsmith",
    cls=_Program,
    help="Train, merge, compress and check the weights of neural networks.",
    epilog="Example: weightsmith run recipes/quickstart.yaml   (add --dry-run to see the plan first)",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"weightsmith {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if debug else "warning: %(message)s",
        stream=sys.stderr,
    )
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def main() -> None:
    """Run the program; never returns."""
    # Small operations run best on one thread per worker, and the limit counts only before torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "--debug" not in sys.argv[1:]:
        warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except BrokenPipeError:  # the reader of our output has left: nothing to say, nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        message, code = _described(error)
        print(f"error: {message}", file=sys.stderr)
    gc.freeze()  # what is alive now lives to the end: nothing to collect on the way out
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, as all that commands say: not the place in our source, nor the source itself."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _described(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, WeightsmithError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # a wrong option or argument, as the library of commands tells it
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context else "weightsmith"
        return f"{command}: {error.format_message().removesuffix('.')} (see `{command} --help`)", 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", 1
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory", 1
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected {what} (`weightsmith --debug ...` shows where)", 1
