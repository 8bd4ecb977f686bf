"""What the Countdown study's runs logged beside their accuracy: reward of the last steps, and the attention monitors.

    rlattn warmup countdown_one_gpu && rlattn study countdown launch.at_once=9     # 13 minutes of an H200
    python -P benchmarks/study_countdown.py                                        # reads them, draws

An evaluation asks 512 problems once; the last LAST steps of a run are 10,240 completions, of the same prompts in every
arm of a seed. Writes `benchmarks/results/study_countdown.json` and `docs/study-countdown-signals.png`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from rlattn.study.config import grid, load_study
from rlattn.study.plots import COLOURS
from rlattn.study.summary import compare
from rlattn.tracking import read_metrics

HERE = Path(__file__).parent
FIRST, LAST = 3, 10  # steps that stand for the beginning and for the end
DRAWN = {
    "signals/attention_entropy/2": "attention entropy, lowest captured layer, nats",
    "signals/attention_entropy/5": "attention entropy, highest captured layer, nats",
    "signals/sink_mass/4": "sink mass, layer 4",
    "signals/head_turnover": "head turnover",
    "signals/waad_mean": "WAAD, tokens",
    "signals/fai_top_share": "share of FAI in its top tokens",
    "entropy": "token entropy, nats",
    "completions/clipped_ratio": "completions truncated",
    "frac_reward_zero_std": "groups without a gradient",
}
PREFIXES = ("signals/", "credit/")
OTHERS = (
    "reward",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "grad_norm",
)


def main() -> None:
    study = load_study("countdown")
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in study.arms}
    accuracy: dict[str, dict[int, dict[int, float]]] = {arm: {} for arm in study.arms}
    for run in grid(study):
        lines = read_metrics(run.folder)
        runs[run.arm][run.seed] = [line for line in lines if line["step"] > 0]
        accuracy[run.arm][run.seed] = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}

    def average(arm: str, seed: int, name: str, steps: range) -> float | None:
        values = [line[name] for line in runs[arm][seed] if line["step"] in steps and line.get(name) is not None]
        return mean(values) if values else None

    total = max(line["step"] for line in runs[study.baseline][study.seeds[0]])
    spans = {"begin": range(1, FIRST + 1), "end": range(total - LAST + 1, total + 1)}
    logged = {name for line in runs[study.baseline][study.seeds[0]] for name in line}
    names = sorted(name for name in logged if name in OTHERS or name.startswith(PREFIXES))
    table = {
        name: {
            when: {arm: [average(arm, seed, name, steps) for seed in study.seeds] for arm in study.arms}
            for when, steps in spans.items()
        }
        for name in names
    }
    rewards = {arm: dict(zip(study.seeds, table["reward"]["end"][arm], strict=True)) for arm in study.arms}
    differences = {}
    for arm, own in rewards.items():
        found = None if arm == study.baseline else compare(rewards[study.baseline], own, study.resamples)
        shown = f"{arm:<16}{100 * mean(own.values()):6.1f}"
        if found:
            differences[arm] = asdict(found)
            shown += f"  {100 * found.paired.difference.value:+5.1f} ± {100 * found.t_half:.1f}"
        print(shown)
    summed = json.loads((study.output_dir / "table.json").read_text())
    figures = {
        "commands": ["rlattn study countdown launch.at_once=9", "python -P benchmarks/study_countdown.py"],
        "study": {key: summed[key] for key in ("study", "versions")},
        "accuracy": accuracy,
        "reward_of_the_last_steps": {"steps": LAST, "scores": rewards, "differences": differences},
        "monitors": {"begin": f"steps 1 to {FIRST}", "end": f"last {LAST} steps", "by_seed": table},
    }
    (HERE / "results" / "study_countdown.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(runs, list(study.arms))


def draw(runs: dict[str, dict[int, list[dict[str, Any]]]], arms: list[str]) -> None:
    """Each monitor over the steps, a line an arm, the mean of its seeds."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 8), layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes.flat, DRAWN.items(), strict=True):
        for colour, arm in zip(COLOURS, arms, strict=False):
            by_step: dict[int, list[float]] = {}
            for line in (line for lines in runs[arm].values() for line in lines if line.get(name) is not None):
                by_step.setdefault(line["step"], []).append(line[name])
            axis.plot(list(by_step), [mean(values) for values in by_step.values()], color=colour, label=arm, lw=1.2)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.supxlabel("step")
    figure.savefig(HERE.parent / "docs" / "study-countdown-signals.png", dpi=100)


if __name__ == "__main__":
    main()
