"""The figures, at a paper's text width, as PNG and SVG. Axes and texts keep to a few inks that the page recolours."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlattn.analysis.analyze import Analysis

WIDTH = 6.8  # inches, two columns
INK, SOFT, RULE = "#1b1d21", "#5a6069", "#e1e1dc"
LOCAL, GLOBAL, THIRD = "#1f5fae", "#c2570c", "#2f7d4f"
# From nothing to an ink that reads on white and on black alike, so that one image serves both.
AMBER = (0.90, 0.55, 0.10)
HEAT = LinearSegmentedColormap.from_list("heat", [(*AMBER, 0.0), (0.85, 0.47, 0.02, 0.75), (0.60, 0.16, 0.10, 1)])
GRID = LinearSegmentedColormap.from_list("grid", [(*AMBER, 0.03), (*AMBER, 0.85)])  # marks must read on it

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.0,
}


@dataclass(frozen=True)
class Plot:
    """A figure as files: PNG at 300 dpi on white, SVG with text as text on nothing."""

    png: bytes
    svg: bytes


def draw(analysis: Analysis, numbers: dict[str, Any]) -> dict[str, Plot]:
    """Every figure that the analysis has something for, by file name."""
    makers: dict[str, Callable[[], Figure]] = {
        "couplings": lambda: couplings(numbers),
        "alignment": lambda: alignment(numbers),
        "head_map": lambda: head_map(numbers),
        "sink_entropy": lambda: sink_entropy(numbers),
    }
    if analysis.perturbation:
        makers["perturbation"] = lambda: perturbation(numbers["perturbation"])
    for place, i in enumerate(analysis.maps, 1):
        makers[f"maps_{place}"] = partial(maps, analysis, i)
        makers[f"curves_{place}"] = partial(curves, analysis, i)
    return {name: _save(name, make) for name, make in makers.items()}


def couplings(numbers: dict[str, Any]) -> Figure:
    """Observed against chance, a panel a coupling, a column a selection of layers."""
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    chosen = numbers["selections"]
    for place, axes in enumerate(np.ravel(figure.subplots(1, 3))):
        rows = [own["couplings"][place] for own in chosen.values()]
        _against_chance(axes, rows, list(chosen), share=place > 0)
        axes.set_title(rows[0]["name"], fontsize=7.5)
        axes.set_ylabel("nats" if place == 0 else "share of FAI peaks")
        axes.tick_params(axis="x", rotation=30)
    return _with_legend(figure)


def alignment(numbers: dict[str, Any]) -> Figure:
    """The same for the partner's place, over the layers that training listens to."""
    figure = Figure(figsize=(WIDTH * 0.72, 2.2), layout="constrained")
    pairs = numbers["selections"]["signals"]["alignment"]
    for (pair, rows), axes in zip(pairs.items(), np.ravel(figure.subplots(1, 2)), strict=True):
        _against_chance(axes, rows, [row["name"] for row in rows], share=True)
        axes.set_title(pair, fontsize=7.5)
    return _with_legend(figure)


def head_map(numbers: dict[str, Any]) -> Figure:
    """Span of every head, groups marked."""
    figure = _head_figure(numbers, 1)
    axes = figure.subplots()
    _grid(figure, axes, numbers, "span", "span, tokens")
    listened = numbers["selections"]["signals"]["layers"]
    layers = _layers(numbers)
    marks = {"local": ("v", LOCAL, "local-focused"), "global": ("^", INK, "global-focused")}
    for group, (marker, colour, label) in marks.items():
        for inside in (True, False):
            heads = [
                (row["head"], layers.index(row["layer"]))
                for row in numbers["heads"]
                if (row["layer"] in listened) == inside
                and (row["group_signals"] if inside else row["group_all"]) == group
            ]
            if heads:
                x, y = np.array(heads).T
                size = max(6.0, min(34.0, 900 / max(max(row["head"] for row in numbers["heads"]) + 1, len(layers))))
                face = colour if inside else "none"
                name = label if inside else f"{label}, grouped over all layers"
                axes.scatter(
                    x, y, s=size, marker=marker, facecolors=face, edgecolors=colour, linewidths=0.9, label=name
                )
    receivers = [
        (row["head"], layers.index(row["layer"]))
        for row in numbers["heads"]
        if (row["receiver_signals"] if row["layer"] in listened else row["receiver_all"])
    ]
    if receivers:
        x, y = np.array(receivers).T
        size = max(30.0, min(150.0, 3000 / len(layers)))
        axes.scatter(
            x, y, s=size, marker="o", facecolors="none", edgecolors=THIRD, linewidths=0.9, label="receiver head"
        )
    for layer in listened:
        y = layers.index(layer)
        axes.plot([-0.5, -0.5], [y - 0.45, y + 0.45], color=INK, linewidth=3, solid_capstyle="butt", clip_on=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def sink_entropy(numbers: dict[str, Any]) -> Figure:
    """Mass on the first token and attention entropy of every head."""
    figure = _head_figure(numbers, 2)
    left, right = figure.subplots(1, 2)
    _grid(figure, left, numbers, "sink_mass", "mass on the first token")
    _grid(figure, right, numbers, "entropy", "attention entropy, nats")
    return figure


def perturbation(result: dict[str, Any]) -> Figure:
    """Similarity at top against bottom positions, a dot a response."""
    figure = Figure(figsize=(WIDTH * 0.5, 3.0), layout="constrained")
    axes = figure.subplots()
    bottom, top = (np.array([pair[k] for pair in result["pairs"]]) for k in (2, 1))
    low = min(0.0, *bottom, *top)
    axes.plot([low, 1], [low, 1], color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)))
    axes.scatter(bottom, top, s=16, color=LOCAL, alpha=0.55, linewidths=0, label="a response")
    axes.errorbar(
        result["bottom"]["value"],
        result["top"]["value"],
        xerr=_arms(result["bottom"]),
        yerr=_arms(result["top"]),
        fmt="s",
        markersize=4.5,
        color=GLOBAL,
        label="mean, 95%",
    )
    axes.set(xlabel="Jaccard at lowest-FAI positions", ylabel="Jaccard at highest-FAI positions", aspect="equal")
    axes.legend(loc="lower right")
    return figure


def maps(analysis: Analysis, i: int) -> Figure:
    """Ā_loc and Ā_glob of one response; lines where the response begins."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    prompt = len(analysis.responses[i].prompt_ids)
    titles = ("Ā_loc, local-focused heads", "Ā_glob, global-focused heads")
    for axes, own, title in zip(figure.subplots(1, 2, sharey=True), analysis.maps[i], titles, strict=True):
        norm = PowerNorm(0.4, 0, max(float(np.quantile(own[np.tril_indices(len(own))], 0.999)), 1e-6))
        image = axes.imshow(own, cmap=HEAT, norm=norm, interpolation="nearest")
        if 0 < prompt < len(own):
            for line in (axes.axhline, axes.axvline):
                line(prompt - 0.5, color=SOFT, linewidth=0.6, linestyle=(0, (2, 3)))
        axes.set(title=title, xlabel="key: token looked at")
        _colorbar(figure, image, axes, "attention", 0.7)
    figure.axes[0].set_ylabel("query: token looking")
    return figure


def curves(analysis: Analysis, i: int) -> Figure:
    """WAAD, FAI and entropy along one response, peaks marked."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    signals, peaks = analysis.selected["signals"], analysis.peaks["signals"][i]
    shown: tuple[tuple[str, Any, str, Any], ...] = (
        ("WAAD, tokens", signals.waad[i], LOCAL, peaks.waad),
        ("FAI", signals.fai[i][: peaks.fai_length], GLOBAL, peaks.fai),
        ("entropy, nats", analysis.measured.entropy[i], THIRD, None),
    )
    for axes, (label, values, colour, marks) in zip(figure.subplots(3, 1, sharex=True), shown, strict=True):
        for peak in peaks.waad if marks is None else ():
            axes.axvline(peak + 1, color=LOCAL, linewidth=0.4, alpha=0.5)
        axes.plot(np.arange(1, len(values) + 1), values, color=colour)
        if marks is not None:
            axes.scatter(marks + 1, values[marks], s=12, color=colour, zorder=3, linewidths=0)
        axes.set_ylabel(label)
        axes.margins(x=0.005)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.axes[-1].set_xlabel("response token (thin lines: WAAD peaks)")
    return figure


def _against_chance(axes: Axes, rows: list[dict[str, Any]], names: list[str], *, share: bool) -> None:
    for x, row in enumerate(rows):
        seen, chance = row["observed"], row["chance"]
        if not np.isfinite(seen["value"]):
            continue
        axes.bar(x, seen["value"], width=0.62, color=LOCAL, alpha=0.8, label="observed, 95%" if x == 0 else None)
        axes.errorbar(x, seen["value"], yerr=_arms(seen), color=INK, linewidth=0.8, capsize=2)
        line: Any = {"color": GLOBAL, "linewidth": 1.8, "label": "chance (entropy: all tokens)" if x == 0 else None}
        axes.plot([x - 0.4, x + 0.4], [chance["value"]] * 2, **line)
    axes.set_xticks(range(len(rows)), names)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _with_legend(figure: Figure) -> Figure:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _arms(x: dict[str, float]) -> list[list[float]]:
    return [[max(0.0, x["value"] - x["low"])], [max(0.0, x["high"] - x["value"])]]


def _layers(numbers: dict[str, Any]) -> list[int]:
    return sorted({row["layer"] for row in numbers["heads"]})


def _head_figure(numbers: dict[str, Any], panels: int) -> Figure:
    layers, heads = _layers(numbers), max(row["head"] for row in numbers["heads"]) + 1
    cell = (WIDTH / panels - 1.2) / heads
    height = min(8.0, max(1.3, len(layers) * min(cell, 0.32)))
    return Figure(figsize=(WIDTH, height + 1.0), layout="constrained")


def _grid(figure: Figure, axes: Axes, numbers: dict[str, Any], key: str, label: str) -> None:
    layers = _layers(numbers)
    values = np.array([row[key] for row in numbers["heads"]]).reshape(len(layers), -1)
    image = axes.imshow(values, cmap=GRID, aspect="auto", interpolation="nearest", origin="lower")
    axes.set(xlabel="head", ylabel="layer")
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _colorbar(figure, image, axes, label)


def _colorbar(figure: Figure, image: Any, axes: Axes, label: str, shrink: float = 0.9) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=shrink, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(edgecolor="none", rasterized=True)  # as shapes, seams would show


def _save(name: str, make: Callable[[], Figure]) -> Plot:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = make()
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=300, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(png.getvalue(), svg.getvalue())
