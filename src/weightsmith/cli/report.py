"""`weightsmith report`: the HTML page of a run or of compared merges, made again from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith report runs/quickstart")
    def report(
        folder: Annotated[
            Path, typer.Argument(help="Folder of a run or of compared merges, finished or not.")
        ],
    ) -> None:
        """Write the report of a run, or of compared merges."""
        from weightsmith.reports import write_report

        typer.echo(write_report(folder).resolve())
