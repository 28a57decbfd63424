"""The `weightsmith` program: its commands, its errors as one line each, its exit codes.

Exit codes: 0 done, 1 the machine or a stage failed, 2 the input is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from weightsmith import __version__
from weightsmith.cli import average, evaluate, inspect, merge, methods, report, run, trace
from weightsmith.errors import WeightsmithError

app = typer.Typer(
    name="weightsmith",
    help="Train, merge, compress and check the weights of neural networks.",
    epilog="Example: weightsmith run recipes/quickstart.yaml   (add --dry-run to see the plan first)",
    no_args_is_help=True,
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


for command in (run, merge, average, evaluate, inspect, trace, report, methods):
    command.register(app)


def main() -> None:
    """Run the program; never returns. Typer itself leaves with 2 on a wrong option or a missing argument."""
    # Small operations run best on one thread per worker, and the limit counts only before torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except WeightsmithError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 1)
    except BrokenPipeError:  # the reader of our output has left: nothing to say, nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
