"""`weightsmith average`: the uniform mean of several states of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightsmith.cli import output


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith average run/checkpoint-400 run/checkpoint-500 averaged/")
    def average(
        states: Annotated[list[str], typer.Argument(help="Checkpoint folders, then the folder to make.")],
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        dtype: Annotated[
            str | None,
            typer.Option(help="Output dtype, such as bfloat16; by default the first state's."),
        ] = None,
        threads: Annotated[int | None, typer.Option(help="Worker threads; one per core by default.")] = None,
        as_json: output.AsJson = False,
    ) -> None:
        """Average checkpoints of one run into one."""
        from weightsmith.cli.progress import bars
        from weightsmith.errors import InputError
        from weightsmith.merging import average as average_checkpoints

        *inputs, out = states
        if len(inputs) < 2:
            raise InputError(
                f"average needs two states or more, then a folder to make; got {len(states)} paths"
            )
        with bars() as progress:
            report = average_checkpoints(
                inputs, Path(out), dtype=dtype, overwrite=overwrite, threads=threads, progress=progress("")
            )
        output.print_merged(report, as_json)
