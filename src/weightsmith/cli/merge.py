"""`weightsmith merge`: one page of YAML, ours or mergekit's, and an output folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weightsmith.cli import output
from weightsmith.errors import InputError

if TYPE_CHECKING:
    from weightsmith.merging.comparison import Comparison, CostOfComparison
    from weightsmith.runs.prediction import Prediction

Keep = Literal["all", "best", "none"]


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
        ray: Annotated[
            str | None,
            typer.Option(
                help="Spread one merge over a Ray cluster with a shared file system: auto, local, HOST:PORT."
            ),
        ] = None,
        method: Annotated[
            list[str] | None,
            typer.Option(
                help="Instead of the page's method. `all`, or several of them, make a comparison: OUT gets a "
                "checkpoint for each and a report."
            ),
        ] = None,
        evaluate: Annotated[
            list[str] | None,
            typer.Option(
                help="Score what is compared on a task of the test-bed, a text file, or `module:function`; "
                "may be repeated."
            ),
        ] = None,
        keep: Annotated[
            Keep, typer.Option(help="Which of the compared checkpoints stay; best needs --evaluate.")
        ] = "all",
        as_json: output.AsJson = False,
    ) -> None:
        """Merge checkpoints into one, or by several methods to compare what they make."""
        from weightsmith.cli.progress import bars
        from weightsmith.merging import merge as merge_checkpoints
        from weightsmith.merging import plan_merge

        if method and (method == ["all"] or len(method) > 1):
            if ray is not None:
                raise InputError("--ray: is for one merge; a comparison runs on one machine")
            how: dict[str, Any] = {
                "methods": method,
                "tasks": evaluate or None,
                "keep": keep,
                "device": device,
                "threads": threads,
            }
            _compare(config, out, how, check, overwrite, as_json)
            return
        for option, given in (("--evaluate", evaluate), ("--keep", keep != "all")):
            if given:
                raise InputError(f"{option}: is for comparisons; expected `--method all`, or several methods")
        page: Any = config
        if method:
            from weightsmith.merging.comparison import with_method

            page = with_method(config, method[0])
        if check:
            from weightsmith.merging.check import check as look

            with plan_merge(page, out, overwrite=overwrite, threads=threads, device=device) as plan:
                _show_check(plan.summary(), look(plan), plan.predict(), as_json)
            return
        with bars() as progress:
            report = merge_checkpoints(
                page,
                out,
                overwrite=overwrite,
                threads=threads,
                device=device,
                progress=progress(""),
                ray=ray,
            )
        output.print_merged(report, as_json)


_HEADER = ("model", "layers", "parameters", "dtype", "tokens", "special tokens", "chat template", "ancestry")


def _compare(
    config: Path, out: Path, how: dict[str, Any], check: bool, overwrite: bool, as_json: bool
) -> None:
    from weightsmith.cli.progress import bars
    from weightsmith.merging.comparison import compare, predict_comparison

    if check:
        _show_costs(predict_comparison(config, out, **how), as_json)
        return
    from weightsmith.reports import write_report

    with bars() as progress:
        found = compare(config, out, **how, overwrite=overwrite, progress=progress(""), say=output.say)
    report = write_report(out)
    if as_json:
        output.print_json({**found.content, "report": str(report)})
    else:
        _show_comparison(found)
        typer.echo(f"report: {report.resolve()}")
    found.check()


def _show_costs(cost: CostOfComparison, as_json: bool) -> None:
    if as_json:
        output.print_json(asdict(cost))
        return
    output.warn(cost.warnings)
    output.print_table(_HEADER, [_row(dict(entry)) for entry in cost.models])
    typer.echo()
    rows = [
        (
            name,
            output.size(one.memory_bytes),
            output.size(one.disk_bytes),
            output.duration(one.seconds),
        )
        for name, one in cost.methods.items()
    ]
    output.print_table(("method", "memory", "disk", "time"), rows)
    _show_refused(cost.refused)
    whole = cost.whole
    memory, disk, more = map(output.size, (whole.memory_bytes, whole.disk_bytes, whole.scratch_bytes))
    typer.echo(
        f"{len(rows)} methods: {memory} of memory, {disk} of disk and {more} more meanwhile, about "
        f"{output.duration(whole.seconds)}; nothing was written"
    )


def _show_comparison(found: Comparison) -> None:
    content = found.content
    output.warn(content["warnings"])
    tasks = content["tasks"]
    header = ["method", *tasks, *(["gain"] if tasks else []), "change", "cosine", "time", "memory", "size"]
    rows = []
    for entry in content["methods"]:
        scores = [f"{entry['scores'][task]['value']:.4f}" for task in tasks]
        measures = entry["measures"]
        rows.append(
            [
                entry["method"] + ("" if entry["kept"] else " (not kept)"),
                *scores,
                *([f"{100 * entry['gain']:+.2f} %" if entry["gain"] is not None else "-"] if tasks else []),
                f"{100 * (measures['relative_norm'] or 0):.2g} %",
                " ".join("-" if one is None else f"{one:.2f}" for one in measures["cosine"]),
                output.duration(entry["seconds"]),
                output.size(entry["memory_bytes"]),
                output.size(entry["bytes"]),
            ]
        )
    output.print_table(header, rows)
    _show_refused(content["refused"])


def _show_refused(refused: Mapping[str, str]) -> None:
    for name, why in refused.items():
        typer.echo(f"not {name}: {why}")


def _show_check(summary: dict[str, Any], found: dict[str, Any], cost: Prediction, as_json: bool) -> None:
    warnings = [*summary["warnings"], *found["warnings"]]
    if as_json:
        whole = {**summary, "models": found["models"], "warnings": warnings, "prediction": asdict(cost)}
        output.print_json(whole)
        return
    output.warn(warnings)
    inputs = ", ".join(f"{entry['name']} ({entry['role']})" for entry in summary["inputs"])
    typer.echo(f"{summary['method']} of {inputs}")
    output.print_table(_HEADER, [_row(entry) for entry in found["models"]])
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
