"""`weightsmith evidence`: run the experiment behind a method's verdict, and show it as a page."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

import weightsmith
from weightsmith.cli import output
from weightsmith.errors import InputError, SystemFault, nearest

PACKAGE = Path(weightsmith.__file__).parent
# A wheel carries the scripts inside the package; a source checkout has them beside `src`.
PLACES = (PACKAGE / "evidence", PACKAGE.parents[1] / "evidence")
SHARED = ("plots", "script")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith evidence resm --seeds 0,1,2")
    def evidence(
        name: Annotated[
            str | None, typer.Argument(help="Of the experiment; without it, all are listed.")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that it runs.")] = False,
        seeds: Annotated[
            str | None, typer.Option(help="Seeds with commas between them; three by default.")
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder for the results [default: runs/evidence-NAME]")
        ] = None,
    ) -> None:
        """Run a method's experiment and write its results and a page."""
        scripts = _scripts()
        if name is None:
            _list(scripts)
            return
        if name not in scripts:
            raise InputError(f"no evidence `{name}`{nearest(name, scripts)}; known: {', '.join(scripts)}")
        from weightsmith.reports import write_evidence_page

        folder = (out or Path("runs") / f"evidence-{name}").absolute()
        arguments = [*(["--quick"] if quick else []), "--out", str(folder)]
        if seeds is not None:
            arguments += ["--seeds", *map(str, _numbers(seeds))]
        _run(scripts[name], arguments)
        typer.echo(write_evidence_page(folder, name))


def _scripts() -> dict[str, Path]:
    for place in PLACES:
        found = {file.stem: file for file in sorted(place.glob("*.py")) if file.stem not in SHARED}
        if found:
            return found
    raise SystemFault(f"evidence: no scripts in {' or '.join(map(str, PLACES))}; install weightsmith anew")


def _numbers(seeds: str) -> list[int]:
    parts = seeds.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--seeds: expected numbers with commas between them, got `{seeds}`")
    return [int(part) for part in parts]


def _list(scripts: dict[str, Path]) -> None:
    from weightsmith.registry import METHODS

    verdicts = {card.id: card.verdict for card in METHODS}
    rows = []
    for name, file in scripts.items():
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append((name, " ".join(doc.partition("\n\n")[0].split()), verdicts.get(name, "")))
    output.print_table(("evidence", "asks", "verdict"), rows)


def _run(script: Path, arguments: list[str]) -> None:
    """Run a script as if it had been called by itself."""
    before, sys.argv = sys.argv, [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(str(script.parent))
