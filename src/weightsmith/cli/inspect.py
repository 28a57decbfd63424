"""`weightsmith inspect`: what is in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from weightsmith.cli import output

if TYPE_CHECKING:
    from weightsmith.checkpoints.structure import Summary


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith inspect ./my-model --norms")
    def inspect(
        checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, adapter folder or hub id.")],
        norms: Annotated[
            bool, typer.Option("--norms", help="Also read the weights: norms per block.")
        ] = False,
        spectra: Annotated[
            bool, typer.Option("--spectra", help="Also compute singular values and stable ranks (torch).")
        ] = False,
        as_json: output.AsJson = False,
    ) -> None:
        """Show architecture, parameters per block, dtypes and tied weights of a checkpoint."""
        from weightsmith.checkpoints import summarise
        from weightsmith.cli.progress import bars

        with bars() as progress:
            summary = summarise(checkpoint, norms=norms, spectra=spectra, progress=progress(""))
        if as_json:
            output.print_json(asdict(summary))
        else:
            _show(summary)


def _show(summary: Summary) -> None:
    facts = {
        "architecture": f"{summary.architecture or 'unknown'} ({summary.model_type or 'no model type'})",
        "parameters": f"{summary.parameters:,} ({summary.trainable:,} trainable)",
        "dtypes": ", ".join(f"{dtype}: {count:,}" for dtype, count in summary.dtypes.items()),
        "tied": ", ".join(f"{alias} = {name}" for alias, name in summary.tied.items()) or "nothing",
        "files": f"{len(summary.shards)} with {output.size(summary.weight_bytes)} of weights, "
        f"{output.size(summary.disk_bytes)} in all",
        "quantised": summary.quantized,
        "made by": summary.method,
    }
    typer.echo(summary.name)
    for fact, value in facts.items():
        if value:
            typer.echo(f"  {fact:<13} {value}")
    typer.echo()
    header = ["block", "tensors", "parameters", "size", "dtype"]
    with_norms = any(block.norms for block in summary.blocks)
    rows = []
    for block in summary.blocks:
        row = [
            block.name,
            block.tensors,
            f"{block.parameters:,}",
            output.size(block.nbytes),
            " ".join(block.dtypes),
        ]
        if block.norms:
            row += [f"{block.norms.norm:.4g}", f"{block.norms.rms:.3g}", f"{block.norms.largest:.3g}"]
            row += [block.norms.not_finite]
        rows.append(row)
    output.print_table(header + (["norm", "rms", "largest", "NaN/Inf"] if with_norms else []), rows)
    if summary.spectra:
        typer.echo()
        spectra = [
            (name, f"{spectrum.stable_rank:.2f}", " ".join(f"{value:.3g}" for value in spectrum.top))
            for name, spectrum in summary.spectra.items()
        ]
        output.print_table(("matrix", "stable rank", "largest singular values"), spectra)
