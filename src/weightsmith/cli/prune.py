"""`weightsmith prune`: N of every M weights of a model kept, the others 0."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from weightsmith.cli import output
from weightsmith.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith prune ./my-model ./sparse --method wanda --data notes.txt")
    def prune(
        model: Annotated[str, typer.Argument(help="A causal language model: folder or hub id.")],
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        method: Annotated[
            str, typer.Option(help="magnitude, wanda, ria, sparsegpt, sparseswaps or maskpro.")
        ] = "sparsegpt",
        pattern: Annotated[
            str | None, typer.Option(help="N:M, weights KEPT of each M inputs; 2:4 by default.")
        ] = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                help="What to calibrate on: files, tasks of the test-bed, hub data sets; may repeat."
            ),
        ] = None,
        option: Annotated[
            list[str] | None,
            typer.Option(help="An option of the method, KEY=VALUE as in a recipe; may be repeated."),
        ] = None,
        samples: Annotated[int, typer.Option(min=1, help="Windows of calibration data.")] = 128,
        length: Annotated[
            int | None, typer.Option(min=2, help="Tokens of a window; by default as in training.")
        ] = None,
        batch_size: Annotated[int, typer.Option(min=1, help="Windows in a forward pass.")] = 8,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        work: Annotated[
            Path | None,
            typer.Option(
                help="Folder for MaskPro's state: the same command goes on where it was killed. By default "
                "OUT.work, deleted in the end."
            ),
        ] = None,
        export: Annotated[
            Literal["dense", "semi-structured"],
            typer.Option(
                help="dense: tensors with zeros, which load anywhere. semi-structured: also packed for "
                "sparse tensor cores (2:4, needs a CUDA device)."
            ),
        ] = "dense",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        as_json: output.AsJson = False,
    ) -> None:
        """Prune a model to N of every M weights."""
        from weightsmith.cli.progress import bars
        from weightsmith.compression import prune_checkpoint
        from weightsmith.compression.nm.options import MaskProConfig
        from weightsmith.recipes.stages.prune import Prune
        from weightsmith.recipes.validation import show

        if work is not None and method != MaskProConfig.kind:
            raise InputError(f"--work: is for MaskPro's state, and {method} has none; leave it out")
        given: dict[str, Any] = {
            "model": model,
            "pattern": pattern,
            "method": {method: output.key_values(option)} if option else method,
            "data": data or None,
            "samples": samples,
            "length": length,
            "batch_size": batch_size,
            "export": export,
        }
        stage, problems = Prune.parse({key: value for key, value in given.items() if value is not None})
        problems = [*problems, *(stage.problems() if stage else ())]
        if stage is None or problems:
            raise InputError(
                "\n".join(f"{show(problem.keys)}: {problem.text}".lstrip(": ") for problem in problems)
            )
        stage.check_data()
        own = out.with_name(f"{out.name}.work") if work is None and method == MaskProConfig.kind else None
        with bars() as progress:
            report = prune_checkpoint(
                model,
                out,
                stage.method,
                stage.calibration(model, seed=getattr(stage.method, "seed", None) or 0),
                data=[Path(entry).name for entry in data or ()],
                device=device,
                work=work or own,
                progress=progress(""),
                overwrite=overwrite,
                export=stage.export,
            )
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        if as_json:
            output.print_json({"path": str(report.path), **report.to_json()})
            return
        share = 100 * report.pruned / report.parameters
        typer.echo(
            f"{report.path}: {report.method} {report.pattern} of {report.pruned:,} weights ({share:.0f} % of "
            f"the model), in {output.duration(report.seconds)}"
        )
        if report.packed_by is not None:
            typer.echo(
                f"  {len(report.layers)} matrices packed for sparse tensor cores by {report.packed_by}"
            )
        for name, loss in report.losses.items():
            typer.echo(f"  loss on the calibration batches, {name}: {loss:.4f}")
        for name, reason in report.absent.items():
            typer.echo(f"  not compared with {name}: {reason}")
