"""`weightsmith merge`: one page of YAML, ours or mergekit's, and an output folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightsmith.cli import output

if TYPE_CHECKING:
    from weightsmith.runs.prediction import Prediction


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith merge merge.yml merged/ --check")
    def merge(
        config: Annotated[Path, typer.Argument(help="A page of YAML; mergekit's pages run as they are.")],
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        check: Annotated[
            bool, typer.Option("--check", help="Check everything and predict the cost; write nothing.")
        ] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        threads: Annotated[
            int | None, typer.Option(min=1, help="Workers at once; one per core by default.")
        ] = None,
        device: Annotated[str, typer.Option(help="For spectral methods: auto, cpu or cuda.")] = "auto",
        as_json: output.AsJson = False,
    ) -> None:
        """Merge checkpoints into one."""
        from weightsmith.cli.progress import bars
        from weightsmith.merging import merge as merge_checkpoints
        from weightsmith.merging import plan_merge

        if check:
            with plan_merge(config, out, overwrite=overwrite, threads=threads, device=device) as plan:
                _show_check(plan.summary(), plan.predict(), as_json)
            return
        with bars() as progress:
            report = merge_checkpoints(
                config, out, overwrite=overwrite, threads=threads, device=device, progress=progress("")
            )
        output.print_merged(report, as_json)


def _show_check(summary: dict[str, Any], cost: Prediction, as_json: bool) -> None:
    if as_json:
        output.print_json({**summary, "prediction": asdict(cost)})
        return
    output.warn(summary["warnings"])
    inputs = ", ".join(f"{entry['name']} ({entry['role']})" for entry in summary["inputs"])
    typer.echo(f"{summary['method']} of {inputs}")
    dtypes = ", ".join(summary["dtypes"])
    typer.echo(f"{summary['tensors']} tensors, {summary['parameters']:,} parameters in {dtypes}")
    typer.echo(
        f"reads {output.size(summary['read_bytes'])}, writes {output.size(cost.disk_bytes)}; about "
        f"{output.size(cost.memory_bytes)} of memory and {output.duration(cost.seconds)}; nothing was written"
    )
