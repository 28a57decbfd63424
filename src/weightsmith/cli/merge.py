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
            from weightsmith.merging.check import check as look

            with plan_merge(config, out, overwrite=overwrite, threads=threads, device=device) as plan:
                _show_check(plan.summary(), look(plan), plan.predict(), as_json)
            return
        with bars() as progress:
            report = merge_checkpoints(
                config, out, overwrite=overwrite, threads=threads, device=device, progress=progress("")
            )
        output.print_merged(report, as_json)


def _show_check(summary: dict[str, Any], found: dict[str, Any], cost: Prediction, as_json: bool) -> None:
    warnings = [*summary["warnings"], *found["warnings"]]
    if as_json:
        whole = {**summary, "models": found["models"], "warnings": warnings, "prediction": asdict(cost)}
        output.print_json(whole)
        return
    output.warn(warnings)
    inputs = ", ".join(f"{entry['name']} ({entry['role']})" for entry in summary["inputs"])
    typer.echo(f"{summary['method']} of {inputs}")
    header = [
        "model",
        "layers",
        "parameters",
        "dtype",
        "tokens",
        "special tokens",
        "chat template",
        "ancestry",
    ]
    output.print_table(header, [_row(entry) for entry in found["models"]])
    for note in summary["notes"]:
        typer.echo(note)
    dtypes = ", ".join(summary["dtypes"])
    typer.echo(f"{summary['tensors']} tensors, {summary['parameters']:,} parameters in {dtypes}")
    typer.echo(
        f"reads {output.size(summary['read_bytes'])}, writes {output.size(cost.disk_bytes)}; about "
        f"{output.size(cost.memory_bytes)} of memory and {output.duration(cost.seconds)}; nothing was written"
    )


def _row(entry: dict[str, Any]) -> list[Any]:
    """One model as a line of the table."""
    tokens = "-" if entry["tokens"] is None else f"{entry['tokens']:,}"
    if entry["rows"] not in (None, entry["tokens"]):
        tokens += f" in {entry['rows']:,} rows"
    special = ", ".join(f"{role} {token}" for role, token in entry["special_tokens"].items())
    ancestry = entry["ancestry"]
    words = "" if entry["role"] == "model" else entry["role"]
    if ancestry is not None:
        words = f"{100 * ancestry['relative_norm']:.2g} % changed, cosine {ancestry['cosine']:.3f}"
        words += f"; lineage: {ancestry['lineage']}" if ancestry["lineage"] else ""
    return [
        entry["name"],
        entry["layers"],
        f"{entry['parameters']:,}",
        ", ".join(entry["dtypes"]),
        tokens,
        special or "-",
        entry["chat_template"] or "-",
        words,
    ]
