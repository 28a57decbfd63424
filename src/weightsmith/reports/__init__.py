"""Reports: the folder of a run, compared merges, or an evidence's results -> one self-contained HTML page.

The page opens from disk without a network and without scripts: inline CSS, inline SVG. It is drawn from what
the run folder holds and from nothing else, so a partial run gives a partial page and the same folder gives
the same bytes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["draw_figures", "plot_decay", "write_evidence_page", "write_report"]


def __getattr__(name: str) -> Any:
    # jinja2 and ruamel.yaml cost a tenth of a second that `weightsmith --help` should not pay.
    if name == "write_report":
        from weightsmith.reports.page import write_report

        return write_report
    if name == "write_evidence_page":
        from weightsmith.reports.evidence import write_evidence_page

        return write_evidence_page
    if name == "draw_figures":
        from weightsmith.reports.comparison import draw_figures

        return draw_figures
    if name == "plot_decay":
        from weightsmith.reports.decay import plot_decay

        return plot_decay
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
