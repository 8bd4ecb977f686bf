"""The shipped study's figures, and its final weights asked again with more samples a problem.

    rlattn study quickstart                              # an hour on two cores
    python -P benchmarks/study_quickstart.py             # ten minutes more

An evaluation in training samples one completion a problem, whose noise is as large as the differences looked for. Here
each run's last checkpoint answers the same test problems SAMPLES times. Figures go to
`benchmarks/results/study_quickstart.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlattn.evaluation.results import read_results
from rlattn.evaluation.statistics import estimate
from rlattn.study.config import Run, grid, load_study
from rlattn.study.summary import compare

RESULTS = Path(__file__).parent / "results" / "study_quickstart.json"
SAMPLES = 8


def ask(run: Run) -> float:
    """avg@SAMPLES of a run's last checkpoint on its own test problems; asked once, then read."""
    out = run.folder / f"eval-k{SAMPLES}"
    if not (out / "results.json").is_file():
        command = ["rlattn", "eval", str(run.folder), "-k", str(SAMPLES), "--out", str(out)]
        subprocess.run([f"{sysconfig.get_path('scripts')}/rlattn", *command[1:]], check=True, timeout=1800)
    (result,) = read_results(out)[0]
    return result.avg.value


def main() -> None:
    study = load_study("quickstart")
    scores: dict[str, dict[int, float]] = {name: {} for name in study.arms}
    for run in grid(study):
        scores[run.arm][run.seed] = ask(run)
    again: dict[str, dict[str, Any]] = {}
    for name, by_seed in scores.items():
        again[name] = {"scores": by_seed, "score": asdict(estimate(list(by_seed.values())))}
        shown = f"{name:<16}{again[name]['score']['value']:7.1%}"
        difference = None if name == study.baseline else compare(scores[study.baseline], by_seed, study.resamples)
        if difference:
            again[name]["difference"] = asdict(difference)
            shown += f"  {100 * difference.paired.difference.value:+5.1f} ± {100 * difference.t_half:.1f}"
        print(shown)
    figures = {
        "commands": ["rlattn study quickstart", "python -P benchmarks/study_quickstart.py"],
        "cores": len(os.sched_getaffinity(0)),
        "study": json.loads((study.output_dir / "table.json").read_text()),
        f"asked_again_k{SAMPLES}": again,
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
