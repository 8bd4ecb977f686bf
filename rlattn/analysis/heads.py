"""One row a head: span, attention entropy, sink mass, kurtosis, and the groups it is in."""

from __future__ import annotations

from typing import Any

from rlattn.analysis.measure import Measured, Selected

GROUPS = {-1: "local", 0: "", 1: "global"}


def head_table(measured: Measured, selected: dict[str, Selected]) -> list[dict[str, Any]]:
    """Every captured head, layer by layer; its group among the layers of `signals` (None outside) and of `all`."""
    rows = []
    for i, layer in enumerate(measured.layers):
        for head in range(measured.span.shape[1]):
            row: dict[str, Any] = {
                "layer": layer,
                "head": head,
                "span": float(measured.span[i, head]),
                "entropy": float(measured.attention_entropy[i, head]),
                "sink_mass": float(measured.sink_mass[i, head]),
                "kurtosis": float(measured.kurtosis[i, head]),
            }
            for name in ("signals", "all"):
                own = selected[name]
                place = own.layers.index(layer) if layer in own.layers else None
                row[f"group_{name}"] = None if place is None else GROUPS[int(own.groups[place, head])]
                row[f"receiver_{name}"] = None if place is None else bool(own.receivers[place, head])
            rows.append(row)
    return rows
