"""`weightsmith run`: a recipe from its first stage to its report."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightsmith.cli import output

if TYPE_CHECKING:
    from weightsmith.recipes import RunPlan


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith run recipes/quickstart.yaml --dry-run")
    def run(
        recipe: Annotated[Path, typer.Argument(help="A page of YAML.")],
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print what would be done and what it costs; start nothing.")
        ] = False,
        jobs: Annotated[
            int | None, typer.Option(min=1, help="Stages at once; two by default, one on a single core.")
        ] = None,
        root: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
        as_json: output.AsJson = False,
    ) -> None:
        """Run the stages of a recipe that are not done yet, then write the report."""
        from weightsmith.cli.progress import bars
        from weightsmith.recipes import RunFailed, load_page, plan_run, run_recipe
        from weightsmith.reports import write_report

        page = load_page(recipe)
        plan = plan_run(page, root=root, jobs=jobs)
        if dry_run:
            _show_plan(plan, as_json)
            _warn(plan)
            return
        if not as_json:
            _show_plan(plan, as_json)
        _warn(plan)
        plan.check_disk()
        try:
            with bars() as progress:
                result = run_recipe(page, root=root, jobs=jobs, plan=plan, progress=progress, say=_say)
        except RunFailed as failure:
            # What did finish is worth looking at.
            _say(f"report so far: {write_report(failure.result.folder)}")
            raise
        report = write_report(result.folder)
        if as_json:
            stages: list[dict[str, Any]] = [asdict(stage) for stage in result.stages]
            output.print_json({"report": str(report), "seconds": result.seconds, "stages": stages})
        else:
            typer.echo(f"done in {output.duration(result.seconds)}; report: {report.resolve()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show_plan(plan: RunPlan, as_json: bool) -> None:
    if as_json:
        total = asdict(plan.total)
        output.print_json({**asdict(plan), "total": total})
        return
    rows = [
        (
            stage.stage,
            stage.kind,
            stage.status,
            ", ".join(stage.reads),
            output.size(stage.prediction.memory_bytes),
            output.size(stage.prediction.disk_bytes),
            output.duration(stage.prediction.seconds),
        )
        for stage in plan.stages
    ]
    output.print_table(("stage", "kind", "status", "reads", "memory", "disk", "time"), rows)
    total = plan.total
    typer.echo(
        f"to do, {plan.jobs} at once: {output.size(total.memory_bytes)} of memory, "
        f"{output.size(total.disk_bytes)} of disk and {output.size(total.scratch_bytes)} more meanwhile, "
        f"about {output.duration(total.seconds)}"
    )


def _warn(plan: RunPlan) -> None:
    for stage in plan.stages:
        for warning in stage.warnings:
            _say(f"warning: {stage.stage}: {warning}")
