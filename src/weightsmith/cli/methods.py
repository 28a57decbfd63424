"""`weightsmith methods`: what is in the toolkit, from the registry."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from weightsmith.cli import output
from weightsmith.errors import InputError, nearest
from weightsmith.registry import cards


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(epilog="Example: weightsmith methods --room merging")
    def methods(
        room: Annotated[str | None, typer.Option(help="Only one wing, such as `merging`.")] = None,
        as_json: output.AsJson = False,
    ) -> None:
        """List the methods, what each is for and what our evidence shows."""
        found = cards(room)
        if not found:
            rooms = sorted({card.room for card in cards()})
            raise InputError(
                f"no room `{room}`{nearest(room or '', rooms) or '; known: ' + ', '.join(rooms)}"
            )
        if as_json:
            output.print_json([asdict(card) for card in found])
            return
        rows = [(card.id, card.purpose, card.verdict, card.paper and f"arXiv:{card.paper}") for card in found]
        output.print_table(("method", "for", "evidence", "paper"), rows)
