"""`weightsmith trace`: the family tree of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightsmith.cli import output

if TYPE_CHECKING:
    from weightsmith.checkpoints.tracing import Trace


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith trace runs/quickstart/stages/resm/checkpoint --verify")
    def trace(
        checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
        search: Annotated[
            list[Path] | None,
            typer.Option(help="Look for ancestors below this folder too; may repeat."),
        ] = None,
        verify: Annotated[bool, typer.Option("--verify", help="Compare every byte, not samples.")] = False,
        as_json: output.AsJson = False,
    ) -> None:
        """Show what a checkpoint was made from, and which of its ancestors can still be found."""
        from weightsmith.checkpoints import trace as trace_checkpoint

        root = trace_checkpoint(checkpoint, search or (), verify)
        if as_json:
            output.print_json(root.to_json())
        else:
            _show(root)


def _show(node: Trace, lead: str = "", branch: str = "") -> None:
    made = f"{node.method}({_options(node)})" if node.method else "origin unknown"
    state = {"full": "verified", "quick": "samples verified", "": "not verified"}[node.verified]
    place = f"{node.found} ({state})" if node.found else node.note or "not found"
    typer.echo(f"{lead}{branch}{node.role} {node.name}: {made}")
    below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    typer.echo(f"{below}{'│' if node.inputs else ' '}    {node.fingerprint}  {place}")
    if node.note and node.found:
        typer.echo(f"{below}{'│' if node.inputs else ' '}    {node.note}")
    for index, child in enumerate(node.inputs):
        _show(child, below, "└─ " if index == len(node.inputs) - 1 else "├─ ")


def _options(node: Trace) -> str:
    shown = {key: value for key, value in node.parameters.items() if not isinstance(value, dict | list)}
    if node.seed is not None:
        shown["seed"] = node.seed
    return ", ".join(f"{key}={value}" for key, value in shown.items() if value is not None)
