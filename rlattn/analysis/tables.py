"""The tables of an analysis, for the terminal."""

from __future__ import annotations

from math import isfinite

from rich.table import Table

from rlattn.analysis.analyze import Analysis
from rlattn.analysis.bootstrap import Interval
from rlattn.console import Console


def show(analysis: Analysis, console: Console) -> None:
    """Couplings by layers, and the perturbation study."""
    table = Table(title="couplings", box=None, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layers", "what goes together", "observed", "chance", "lift [95%]"):
        table.add_column(name, justify="left" if name[0] in "lw" and "[" not in name else "right", no_wrap=True)
    for name, rows in analysis.couplings.items():
        for i, row in enumerate(rows):
            share = not row.name.startswith("entropy")
            shown = [_value(x.value, share) for x in (row.observed, row.chance)]
            table.add_row(name if i == 0 else "", row.name, *shown, _cell(row.lift, "{:.2f}"))
    console.show(table)
    if result := analysis.perturbation:
        console.note(
            f"perturbation: Jaccard {_cell(result.top)} at top-FAI positions, {_cell(result.bottom)} at bottom ones; "
            f"top < bottom in {result.share.value:.0%} of {result.responses} responses ({result.ties} ties), "
            f"p = {result.p_value:.2g} (permutation), {result.sign_p_value:.2g} (sign)"
        )


def _value(x: float, percent: bool) -> str:
    return (f"{x:.1%}" if percent else f"{x:.3f}") if isfinite(x) else "–"


def _cell(x: Interval, form: str = "{:.3f}") -> str:
    return f"{form.format(x.value)} [{form.format(x.low)}, {form.format(x.high)}]" if isfinite(x.value) else "–"
