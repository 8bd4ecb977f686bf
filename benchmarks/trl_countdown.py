"""Plain TRL beside the adapter on Countdown: the quickstart's model, batches and learning rate, TRL's own generation.

    rlattn warmup quickstart                             # the starting model, two minutes
    python -P benchmarks/trl_countdown.py                # six runs of a few minutes each on two cores

Arms differ in the trainer's class and `credit` alone. What is in `benchmarks/results/trl_countdown.json` is not run
again, so the runs can be made in pieces (`--arms plain --seeds 1`). Seconds are of this machine; what counts is the
accuracy. Where other work shares the cores, OMP_NUM_THREADS=1 keeps threads from waiting for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from rlattn.config import load_config
from rlattn.problem import Problem
from rlattn.tasks import Task, load_task
from rlattn.trainers.trl import CreditGRPOTrainer
from rlattn.trainers.warmup import warmup
from rlattn.versions import installed_versions

RESULTS = Path(__file__).parent / "results" / "trl_countdown.json"
PACKAGES = ("rlattn", "torch", "transformers", "trl", "accelerate")
SAMPLES = 2  # completions a test problem
LENGTH = 160
STEPS = 16  # generations; two optimizer steps each


def arguments(folder: str, seed: int) -> GRPOConfig:
    """The quickstart's settings in TRL's names: 32 prompts x 8 completions, in two optimizer steps of 128."""
    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        max_steps=2 * STEPS,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_generations=8,
        max_completion_length=LENGTH,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        loss_type="grpo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_steps=2,
        disable_tqdm=True,
    )


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """avg@SAMPLES over the test problems at temperature 1, the same draws whenever it is asked."""
    torch.manual_seed(0)
    right = []
    asked = [problem for problem in task.test for _ in range(SAMPLES)]
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        inputs = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=LENGTH)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [task.verifier(p.answer, text).right for p, text in zip(part, texts, strict=True)]
    return sum(right) / len(right)


def run(arm: str, seed: int, path: Path, task: Task) -> dict[str, Any]:
    problems: list[Problem] = task.train

    def correct(completions: list[str], row: list[int], **_: Any) -> list[float]:
        pairs = zip(row, completions, strict=True)
        return [float(task.verifier(problems[i].answer, text).right) for i, text in pairs]

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = Dataset.from_dict({"prompt": [p.prompt for p in problems], "row": list(range(len(problems)))})
    before = accuracy(model, tokenizer, task)
    with tempfile.TemporaryDirectory() as folder:
        common = {"args": arguments(folder, seed), "train_dataset": data, "processing_class": tokenizer}
        if arm == "plain":
            trainer = GRPOTrainer(model, correct, **common)
        else:
            trainer = CreditGRPOTrainer(model, correct, **common, credit={"name": arm})
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    after = accuracy(trainer.model.eval(), tokenizer, task)
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return {
        "arm": arm,
        "seed": seed,
        "accuracy_before": before,
        "accuracy_after": after,
        "points": 100 * (after - before),
        "reward_by_step": [line["reward"] for line in lines],
        "mean_gamma": [line["credit/mean_gamma"] for line in lines if "credit/mean_gamma" in line],
        "train_seconds": seconds,
    }


def stored() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["plain", "coupled_rhythm"], help="plain, or a credit strategy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    config = load_config("quickstart")
    with Progress() as progress:
        path = warmup(config, progress)
    task = load_task(config.task, config.task.seed)
    facts = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(PACKAGES),
        "test_problems": len(task.test),
        "samples": SAMPLES,
    }
    for seed in args.seeds:
        for arm in args.arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in stored()):
                row = run(arm, seed, path, task)
                RESULTS.write_text(json.dumps(facts | {"runs": [*stored(), row]}, indent=2) + "\n")
    line = "{arm:<16} seed {seed}: {accuracy_before:.1%} -> {accuracy_after:.1%} ({points:+.1f}), {train_seconds:.0f} s"
    for row in sorted(stored(), key=lambda row: (row["arm"], row["seed"])):
        print(line.format(**row))


if __name__ == "__main__":
    main()
