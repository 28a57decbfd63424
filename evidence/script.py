"""What the evidence scripts share: their options, and where their results go."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.runs.atomic import write_json, write_text

RESULTS = Path(__file__).parent / "results"


def parser_of(doc: str | None, quick: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """`--quick`, `--seeds`, `--out`.

    Args:
        doc: The script's docstring, its help.
        quick: What `--quick` does.
        seeds: Those of the committed results.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default {RESULTS}; none with --quick)"
    )
    return parser


def publish(
    name: str, chosen: argparse.Namespace, results: Mapping[str, Any], words: str, drawing: str | None = None
) -> None:
    """Print the table, and write `name`.json, .md and .svg where the options say so."""
    out = chosen.out or (None if chosen.quick else RESULTS)
    if out:
        write_json(out / f"{name}.json", results)
        write_text(out / f"{name}.md", words)
        if drawing is not None:
            write_text(out / f"{name}.svg", drawing)
    print(words)
