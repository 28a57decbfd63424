"""`weightsmith evaluate`: score models on tasks."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from weightsmith.cli import output


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith evaluate ./base ./merged --task source --task notes.txt")
    def evaluate(
        models: Annotated[list[str], typer.Argument(help="Checkpoint folders or hub ids.")],
        task: Annotated[
            list[str],
            typer.Option(
                help="A task of the test-bed, `all` of them, `niah` or `mdqa` (facts in a long context), a "
                "text file (bits per byte), `lm_eval:TASK` of lm-evaluation-harness, or `module:function`; "
                "may be repeated."
            ),
        ],
        split: Annotated[
            Literal["test", "calibration"], typer.Option(help="Which pool of the test-bed's tasks.")
        ] = "test",
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        as_json: output.AsJson = False,
    ) -> None:
        """Score models on tasks and print one row for each model."""
        from weightsmith.cli.progress import bars
        from weightsmith.evaluation import evaluate as evaluate_model

        tasks = "all" if task == ["all"] else task
        with bars() as progress:
            scores = {
                model: evaluate_model(model, tasks, split=split, device=device, progress=progress(model))
                for model in models
            }
        if as_json:
            table = {
                model: {name: score.to_json() for name, score in row.items()} for model, row in scores.items()
            }
            output.print_json({"split": split, "models": table})
            return
        first = next(iter(scores.values()))
        header = ["model", *(f"{name} ({score.metric.replace('_', ' ')})" for name, score in first.items())]
        rows = [[model, *(f"{score.value:.4f}" for score in row.values())] for model, row in scores.items()]
        output.print_table(header, rows)
