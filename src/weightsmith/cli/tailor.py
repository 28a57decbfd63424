"""`weightsmith tailor`: fewer layers, chosen from a base and its fine-tunes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightsmith.cli import output
from weightsmith.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        epilog="Example: weightsmith tailor ./base ./small --candidate ./code --sparsity .25 --task my.txt"
    )
    def tailor(
        base: Annotated[str, typer.Argument(help="The base: folder or hub id.")],
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        candidate: Annotated[
            list[str] | None, typer.Option(help="A fine-tune of the base; may be repeated.")
        ] = None,
        task: Annotated[
            list[str] | None,
            typer.Option(help="What combinations are scored on, as `evaluate` takes it; may be repeated."),
        ] = None,
        sparsity: Annotated[float | None, typer.Option(help="Share of the layers to drop.")] = None,
        keep_layers: Annotated[int | None, typer.Option(help="Layers to keep, instead.")] = None,
        trials: Annotated[int, typer.Option(min=1, help="Combinations to measure.")] = 500,
        option: Annotated[
            list[str] | None,
            typer.Option(help="An option of the search, KEY=VALUE as in a recipe; may be repeated."),
        ] = None,
        plan: Annotated[
            Path | None,
            typer.Option(
                help="Build this plan instead of searching: ours, or one that the paper's authors published."
            ),
        ] = None,
        work: Annotated[
            Path | None,
            typer.Option(
                help="Folder of the log and the plan: the same command goes on where it was killed."
            ),
        ] = None,
        workers: Annotated[int, typer.Option(min=1, help="Trials at once, in processes of their own.")] = 1,
        ray: Annotated[str | None, typer.Option(help="A Ray cluster: auto, local or HOST:PORT.")] = None,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        dtype: Annotated[str, typer.Option(help="Of the output; by default as the base is stored.")] = "auto",
        mergekit: Annotated[
            Path | None, typer.Option(help="Also write the page that makes mergekit build the same model.")
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
        as_json: output.AsJson = False,
    ) -> None:
        """Make a model with fewer layers, chosen by search."""
        import os

        from weightsmith.cli.progress import bars
        from weightsmith.compression import TailorSearch
        from weightsmith.compression.tailoring.options import TailorOptions
        from weightsmith.errors import CheckpointError
        from weightsmith.recipes.stages.tailor import Tailor
        from weightsmith.recipes.validation import show
        from weightsmith.runs.atomic import write_text
        from weightsmith.tensors.floats import parse_dtype

        searching = {
            "task": task,
            "sparsity": sparsity,
            "keep-layers": keep_layers,
            "option": option,
            "work": work,
            "ray": ray,
        }
        if os.path.lexists(out) and not overwrite:
            raise CheckpointError(f"{out}: exists already; choose another output or pass --overwrite")
        if dtype != "auto":
            parse_dtype(dtype)
        if plan is not None and (idle := [name for name, value in searching.items() if value is not None]):
            raise InputError(f"tailor: --{idle[0]} is for a search, and --plan needs none; leave one out")
        options = output.key_values(option or ())
        if twice := [key for key in ("base", "candidates", "workers", "ray", "device") if key in options]:
            raise InputError(f"tailor: --option {twice[0]}: expected an option of the search; see --help")
        candidates = candidate or []
        with bars() as progress:
            if plan is not None:
                chosen = read_plan(plan, base, candidates)
            else:
                given: dict[str, Any] = {"base": base, "candidates": candidates, "trials": trials}
                given |= {"tasks": task, "sparsity": sparsity, "keep_layers": keep_layers, "workers": workers}
                body = {key: value for key, value in given.items() if value is not None}
                stage, problems = Tailor.parse({**body, **options})
                problems = [*problems, *(stage.problems() if stage else ())]
                if stage is None or problems:
                    raise InputError(
                        "\n".join(
                            f"{show(problem.keys)}: {problem.text}".lstrip(": ") for problem in problems
                        )
                    )
                if stage.tasks is None:
                    raise InputError(
                        "tailor: give what to score combinations on: --task NAME, FILE or MODULE:FUNCTION"
                    )
                chosen = TailorSearch(
                    base,
                    candidates,
                    tasks=stage.tasks,
                    work=work,
                    num_workers=workers,
                    ray=ray,
                    device=device,
                    progress=progress(""),
                    **stage.search_options(TailorOptions.seed),
                ).run()
            chosen.save_pretrained(out, dtype=dtype, overwrite=overwrite, progress=progress(""))
        if mergekit is not None:
            write_text(mergekit, chosen.to_mergekit_yaml())
        if as_json:
            output.print_json({"path": str(out), **chosen.to_json()})
            return
        dropped = ", ".join(map(str, chosen.configuration.dropped)) or "none"
        typer.echo(
            f"{out}: {len(chosen.configuration.kept)} of {chosen.configuration.depth} layers; dropped "
            f"{dropped}; {chosen.configuration.num_merged} blended"
        )
        for name, cost in chosen.costs.items():
            typer.echo(f"  score on {name}, {chosen.budget} calibration examples at most: {1 - cost:.3f}")


def read_plan(file: Path, base: str, candidates: list[str]) -> Any:
    """A plan of ours for these models, or one that the paper's authors published.

    Raises:
        InputError: the file is neither.
    """
    from weightsmith.compression import TailorPlan
    from weightsmith.runs.atomic import read_json

    content = read_json(file)
    if isinstance(content, dict) and content.get("method") == "gptailor":
        return TailorPlan.from_json(content, file, sources=[base, *candidates])
    return TailorPlan.from_auto_merge_llm(content, base, candidates)
