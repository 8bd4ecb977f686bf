"""The tables of an analysis, for the terminal."""

from __future__ import annotations

from math import isfinite

from rich.table import Table

from rlattn.analysis.analyze import Analysis
from rlattn.analysis.bootstrap import Interval
from rlattn.analysis.layers import SELECTIONS
from rlattn.console import Console


def show(analysis: Analysis, console: Console) -> None:
    """Couplings by layers, and the perturbation study."""
    table = Table(title="couplings (95% intervals over responses)", box=None, title_justify="left", pad_edge=False)
    for name in ("layers", "coupling", "observed", "chance", "lift"):
        table.add_column(name, justify="left" if name in ("layers", "coupling") else "right")
    for name, rows in analysis.couplings.items():
        for i, row in enumerate(rows):
            share = not row.name.startswith("entropy")
            cells = [_cell(x, share) for x in (row.observed, row.chance)]
            table.add_row(SELECTIONS[name] if i == 0 else "", row.name, *cells, _cell(row.lift, False))
    console.show(table)
    if result := analysis.perturbation:
        console.note(
            f"perturbation: Jaccard {_cell(result.top)} at top-FAI positions, {_cell(result.bottom)} at bottom ones; "
            f"top < bottom in {result.share.value:.0%} of {result.responses} responses ({result.ties} ties), "
            f"p = {result.p_value:.2g} (permutation), {result.sign_p_value:.2g} (sign)"
        )


def _cell(x: Interval, percent: bool = False) -> str:
    if not isfinite(x.value):
        return "–"
    form = "{:.1%}" if percent else "{:.3f}"
    return f"{form.format(x.value)} [{form.format(x.low)}, {form.format(x.high)}]"
