"""`weightsmith stats`: what Fisher merging and RegMean need to know of a model, measured on data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from weightsmith.cli import output

Kind = Literal["fisher", "gram", "all"]
Labels = Literal["data", "model"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith stats models/code stats/code --data code.jsonl --kind gram")
    def stats(
        model: Annotated[
            str, typer.Argument(help="A causal language model: folder, hub id, adapter, model+adapter.")
        ],
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        data: Annotated[
            list[str],
            typer.Option(help="What the model was tuned on: files, tasks of the test-bed, hub data sets."),
        ],
        kind: Annotated[
            Kind, typer.Option(help="fisher for `fisher`, gram for `regmean`; all is both.")
        ] = "all",
        examples: Annotated[int, typer.Option(min=1, help="Windows of text that are read.")] = 256,
        length: Annotated[
            int | None, typer.Option(min=2, help="Tokens of a window; by default as in training.")
        ] = None,
        labels: Annotated[
            Labels, typer.Option(help="Fisher information of the data's tokens or of the model's own.")
        ] = "data",
        seed: Annotated[int, typer.Option(min=0, help="Of the windows and of tokens that are drawn.")] = 0,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        memory: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="Gigabytes for Gram matrices; what doesn't fit takes more passes over the data. Half of "
                "what is free by default.",
            ),
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        as_json: output.AsJson = False,
    ) -> None:
        """Measure a model on data, for merge methods that need statistics."""
        from weightsmith.checkpoints import Checkpoint
        from weightsmith.cli.progress import bars
        from weightsmith.evaluation.models import load_tokenizer, tokenizer_folder, window_length
        from weightsmith.merging import measure
        from weightsmith.training.data import held_out_batches

        with Checkpoint.open(model) as checkpoint:
            folder, config = tokenizer_folder(checkpoint), checkpoint.config
        batches = held_out_batches(
            data,
            load_tokenizer(folder),
            length=length or window_length(config),
            batch_size=1,
            batches=examples,
            seed=seed,
        )
        with bars() as progress:
            report = measure(
                model,
                batches,
                out,
                kinds=("fisher", "gram") if kind == "all" else (kind,),
                labels=labels,
                data=[Path(entry).name for entry in data],
                device=device,
                seed=seed,
                gram_bytes=None if memory is None else round(memory * 1e9),
                overwrite=overwrite,
                progress=progress(""),
            )
        if as_json:
            output.print_json(asdict(report))
            return
        what = " and ".join(report.kinds)
        again = f" in {report.passes} passes" if report.passes > 1 else ""
        typer.echo(
            f"{report.path}: {what} of {report.examples} examples, {report.tokens:,} tokens{again}, "
            f"{output.size(report.bytes)}"
        )
