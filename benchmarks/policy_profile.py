"""Where a policy rank's time goes: one rank in this process, under torch's profiler.

    python -P benchmarks/policy_profile.py                       # a GPU: 0.6B shape, 16 x 256 to 1,024 tokens
    python -P benchmarks/policy_profile.py --shape tiny --case tiny     # a CPU, to see that it runs

Prints, for scoring and for an update: wall time without the profiler, time in which the GPU had a kernel (the rest of
the wall time it waited for Python), and the operators that took most of either. With --trace, a Chrome trace beside.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from policy_vs_trl import CASES, batch, budget
from shapes import DEVICE, SHAPES, save_model, vocabulary

RUNS = 5
SHOWN = 15


def worker_of(shape: str, case: str, folder: Path) -> tuple[Any, Any]:
    """A loaded `PolicyWorker` and its config."""
    from rlattn.config import RunConfig
    from rlattn.trainers.worker import PolicyWorker

    prompt, longest, *_ = CASES[case]
    save_model(shape, folder)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder), "dtype": "bfloat16" if DEVICE == "cuda" else "float32"},
            "rollout": {"max_prompt_length": prompt, "max_completion_length": longest},
            "policy": {
                "gpus_per_rank": int(DEVICE == "cuda"),
                "gradient_checkpointing": True,
                "tokens_per_micro_batch": budget([case]),
            },
        }
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = PolicyWorker(config, 0)
    worker.load(f"tcp://127.0.0.1:{port}", str(folder), str(folder), None)
    return worker, config


def look(name: str, call: Callable[[], object], trace: Path | None) -> dict[str, Any]:
    """Its median time, and what the profiler says of one call."""
    seconds = []
    for _ in range(RUNS + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=kinds) as seen:
        call()
        synchronize()
    if trace:
        seen.export_chrome_trace(str(trace / f"{name}.json"))
    events = seen.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 1e6 if DEVICE == "cuda" else None
    wall = statistics.median(seconds[1:])
    print(f"{name}: {wall * 1e3:.1f} ms; kernels {busy * 1e3:.1f} ms" if busy else f"{name}: {wall * 1e3:.1f} ms")
    for order in ["self_cuda_time_total"] * (DEVICE == "cuda") + ["self_cpu_time_total"]:
        print(events.table(sort_by=order, row_limit=SHOWN, max_name_column_width=60))
    return {"seconds": wall, "kernel_seconds": busy}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--case", choices=CASES, default="1k")
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    from rlattn import packing

    with tempfile.TemporaryDirectory() as name:
        worker, config = worker_of(args.shape, args.case, Path(name))
        rollouts, advantage = batch(args.case, vocabulary(args.shape))
        policy, chunk = config.policy, config.policy.logits_chunk_tokens
        layout = packing.plan(rollouts.lengths.tolist(), 1, policy.tokens_per_micro_batch)
        shard = packing.cut(rollouts, layout, chunk)[0]
        scored = worker.score(shard)
        groups = scored.groups
        logps = packing.restore(rollouts.cu_seqlens, layout, [[part["logps"] for part in scored.columns]])
        columns = {"old_logps": logps, "advantages": advantage[rollouts.sequence_ids]}
        columns["weights"] = torch.full_like(logps, 1 / len(logps))
        learned = packing.cut(rollouts, layout, chunk, **columns)[0]
        found = {
            "score": look("score", lambda: worker.score(shard, groups), args.trace),
            "score with spans": look("score with spans", lambda: worker.score(shard), args.trace),
            "update": look("update", lambda: worker.update([learned]), args.trace),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
