"""Learning curves of a study: a row for each metric, as logged on the left, smoothed on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlattn.study.summary import Arm, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too; with more arms the line styles change.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
STYLES = ("-", "--", ":", "-.")


def draw(summary: Summary, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; returns the paths. Lines are means over seeds, bands their 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    study = summary.study
    metrics = study.metrics
    settings: Any = {"svg.hashsalt": "rlattn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(
            len(metrics), 2, figsize=(10, 3.4 * len(metrics)), sharex=True, squeeze=False, layout="constrained"
        )
        for row, metric in zip(axes, metrics, strict=True):
            for axis, smoothed in zip(row, (False, True), strict=True):
                for place, arm in enumerate(summary.arms):
                    _line(axis, arm, metric, smoothed, COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % 4])
                axis.set_title(f"EMA of the running peak, a = {study.ema:g}" if smoothed else "as logged", fontsize=9)
                axis.set_ylabel(metric)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.grid(alpha=0.25)
            row[1].sharey(row[0])
        for axis in axes[-1]:
            axis.set_xlabel("step")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
        plt.close(figure)
    return paths


def _line(axis: Axes, arm: Arm, metric: str, smoothed: bool, colour: str, style: str) -> None:
    band = (arm.smooth if smoothed else arm.raw)[metric]
    if not band.steps:
        return
    label = f"{arm.name} ({band.seeds} seed{'s' if band.seeds > 1 else ''}{'' if arm.finished else ', unfinished'})"
    name = f"{arm.name} {metric} {'smooth' if smoothed else 'raw'}"  # the id of the line's group in the SVG
    axis.plot(band.steps, [value.value for value in band.values], style, color=colour, label=label, lw=1.6, gid=name)
    lows, highs = [value.low for value in band.values], [value.high for value in band.values]
    axis.fill_between(band.steps, lows, highs, color=colour, alpha=0.1, lw=0, gid=f"{name} band")
