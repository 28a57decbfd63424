"""`weightsmith average`: the mean of several states of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from weightsmith.cli import output

Method = Literal["uniform", "swa", "ema", "lawa", "every", "random", "best", "greedy", "sewa"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith average run/ averaged/ --method lawa --select 5")
    def average(
        states: Annotated[
            list[str],
            typer.Argument(help="Checkpoint folders, or the folder of a run that holds them; then OUT."),
        ],
        method: Annotated[
            Method, typer.Option(help="How states are chosen; best, greedy and sewa look at a loss.")
        ] = "uniform",
        select: Annotated[int | None, typer.Option(min=1, help="States averaged; 10 by default.")] = None,
        last: Annotated[int | None, typer.Option(min=1, help="The latest so many states.")] = None,
        every: Annotated[
            int | None, typer.Option(min=1, help="Each so many-th state, counted back from the latest.")
        ] = None,
        decay: Annotated[float | None, typer.Option(help="Of ema, from one state to the next.")] = None,
        held_out: Annotated[
            list[str] | None,
            typer.Option(help="Data a loss is measured on: files, tasks of the test-bed; may be repeated."),
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        dtype: Annotated[
            str | None,
            typer.Option(help="Output dtype, such as bfloat16; by default that of the states."),
        ] = None,
        device: Annotated[str, typer.Option(help="Where losses are measured: auto, cpu or cuda.")] = "auto",
        threads: Annotated[
            int | None, typer.Option(min=1, help="Workers at once; one per core by default.")
        ] = None,
        as_json: output.AsJson = False,
    ) -> None:
        """Average checkpoints of one run into one."""
        from weightsmith.cli.progress import bars
        from weightsmith.errors import InputError
        from weightsmith.merging import average as merge_uniformly
        from weightsmith.recipes.stages.parts import read_method
        from weightsmith.training.averaged import average_states, thinned
        from weightsmith.training.averaging.candidates import states_of

        *inputs, out = states
        found = states_of(inputs) if len(inputs) == 1 else inputs
        if len(found) < 2:
            raise InputError(
                "average needs two states or more, or the folder of a run that holds them, then a folder to "
                f"make; got {len(states)} path{'s' if len(states) > 1 else ''}"
            )
        given = {"num_select": select, "decay": decay, "held_out": tuple(held_out or ()) or None}
        chosen, problems = read_method(method, {key: item for key, item in given.items() if item is not None})
        if chosen is None:
            options = {"num_select": "--select", "decay": "--decay", "held_out": "--held-out"}
            said = [f"{options[str(p.keys[0])]}: {p.text}" for p in problems]
            raise InputError("\n".join(said).replace("no such key", f"{method} has no such option"))
        folders = thinned(found, last, every)
        with bars() as progress:
            if method == "uniform":
                merged = merge_uniformly(
                    folders,
                    Path(out),
                    dtype=dtype,
                    overwrite=overwrite,
                    threads=threads,
                    progress=progress(""),
                )
                output.print_merged(merged, as_json)
                return
            report = average_states(
                folders,
                Path(out),
                chosen,
                dtype=dtype,
                device=device,
                threads=threads,
                progress=progress(""),
                overwrite=overwrite,
            )
        if as_json:
            output.print_json({"out": str(report.out), **report.selection.to_json()})
            return
        taken = ", ".join(str(step) for step in report.selection.chosen_steps)
        typer.echo(f"{report.out}: {method} of {len(folders)} states; averaged: {taken}")
