"""Exponents and decays over time, one line a matrix, as one SVG: from the records of a run's log file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.names import layer_index
from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_lines, write_text


def series(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each matrix; `key` is alpha or weight_decay. Unknown exponents are left
    out.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record[key].items():
            if value is not None:
                lines.setdefault(name, []).append((int(record["step"]), float(value)))
    return lines


def plot(source: str | Path | Sequence[Mapping[str, Any]], file: str | Path | None = None) -> str:
    """Draw alpha and weight decay of every matrix over the steps of a run.

    Args:
        source: A run's `alphadecay.jsonl`, or its records (`AlphaDecay.history`).
        file: Where to write the SVG as well.

    Returns:
        The SVG; the same records give the same bytes.

    Raises:
        InputError: there are no records.
    """
    records = read_lines(source) if isinstance(source, (str, Path)) else source
    if not records:
        raise InputError(
            f"{source if isinstance(source, (str, Path)) else 'history'}: no look at the spectra to draw"
        )
    svg = _draw(records)
    if file is not None:
        write_text(file, svg)
    return svg


def _draw(records: Sequence[Mapping[str, Any]]) -> str:
    import io

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(records[-1]["alpha"])
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    deepest = max((layer_index(name) or 0 for name in names), default=0)
    # The date would change the file from run to run, and so would random ids.
    with matplotlib.rc_context({"svg.hashsalt": "weightsmith", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, key, label in zip(
            figure.subplots(1, 2), ("alpha", "weight_decay"), ("alpha (Hill)", "weight decay"), strict=True
        ):
            for name, points in series(records, key).items():
                depth = (layer_index(name) or 0) / max(1, deepest)
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{kinds.index(_kind(name)) % 10}",
                    alpha=1 - 0.65 * depth,
                    linewidth=1.2,
                    marker="." if len(points) == 1 else None,
                )
            axes.set_xlabel("optimiser steps")
            axes.set_title(label)
            axes.spines[["top", "right"]].set_visible(False)
        handles = [Line2D([], [], color=f"C{index % 10}", label=kind) for index, kind in enumerate(kinds)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(kinds)), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _kind(name: str) -> str:
    """What a matrix is, wherever it is: model.layers.3.self_attn.q_proj.weight -> q_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]
