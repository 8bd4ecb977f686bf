"""Whole steps of `rlattn train` on random weights, for benchmarks: inputs, config, and what its metrics say."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import DEVICE, make_model, vocabulary

GPU_SHARE = 0.3  # of the memory, vLLM's
TOKENS_PER_MICRO_BATCH = 16_384
PHASES = ("generate", "sleep", "reward", "score", "credit", "update", "weights")
REWARD = """
def reward(completions, **columns):
    return [len(text) % 7 / 7 for text in completions]
"""


@dataclass(frozen=True)
class Load:
    """A batch: prompts, completions of each, prompt tokens, most completion tokens, and their mean without a limit."""

    prompts: int
    generations: int
    prompt: int
    longest: int
    mean: int

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.prompts * self.generations


def ends(shape: str, load: Load) -> list[int]:
    """Tokens that end a completion: the model is nearly uniform over its vocabulary, so their share sets the length."""
    return list(range(max(1, vocabulary(shape) // load.mean)))


def make_inputs(shape: str, load: Load, steps: int, folder: Path) -> None:
    """A model with its tokenizer, training prompts, and a reward that tells completions apart."""
    from transformers import GenerationConfig

    model = make_model(shape)
    model.generation_config = GenerationConfig(eos_token_id=ends(shape, load), pad_token_id=0)
    model.save_pretrained(folder / "model")
    del model
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    save_tokenizer(shape, folder / "model")
    draws = torch.Generator().manual_seed(1)
    size = load.prompts * steps, load.prompt
    rows = torch.randint(vocabulary(shape) // 2, vocabulary(shape), size, generator=draws).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


def save_tokenizer(shape: str, folder: Path) -> None:
    """One that knows token i as the word `wi`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary(shape))}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print it, and write it where that is asked for."""
    print(json.dumps(result, indent=1))
    save(result, out)


def save(result: dict[str, Any], out: Path | None) -> None:
    """Write it where that is asked for; after each part, so that a run that is cut short leaves what it has."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def interval(values: list[float]) -> list[float]:
    """95% bootstrap interval of the median."""
    from scipy.stats import bootstrap

    found = bootstrap((values,), statistics.median, n_resamples=2000, vectorized=False, rng=0).confidence_interval
    return [float(found.low), float(found.high)]


def run_tree(shape: str, load: Load, steps: int, folder: Path, name: str, credit: str) -> dict[str, Any]:
    """The config of a run on these inputs, on one device that engine and policy share."""
    gpu = DEVICE == "cuda"
    return {
        "output_dir": str(folder / name),
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
            "num_generations": load.generations,
            "max_prompt_length": load.prompt,
            "max_completion_length": load.longest,
            "sleep": gpu,
            "enforce_eager": not gpu,
            "engine_args": {"max_num_seqs": load.sequences},
        }
        | ({"gpu_memory_utilization": GPU_SHARE} if gpu else {"kv_cache_gib": 0.25}),
        "policy": {
            "gpus_per_rank": 0.5 if gpu else 0,
            "cpus_per_rank": 4 if gpu else 1,
            "gradient_checkpointing": True,
            "tokens_per_micro_batch": max(TOKENS_PER_MICRO_BATCH, load.prompt + load.longest),
            "deepspeed": {"zero_optimization": {"stage": 1}}
            | ({"data_types": {"grad_accum_dtype": "bf16"}} if shape == "4b" else {}),
        },
        "trainer": {
            "steps": steps,
            "prompts_per_step": load.prompts,
            "eval_steps": 0,
            "save_steps": 0,
            "log_completions": 0,
        },
        "ray": {"placement": "colocate"} if gpu else {},
    }


def train(tree: dict[str, Any], timeout_s: float) -> list[dict[str, float]]:
    """Run it; its steps, as its metrics tell them."""
    folder = Path(tree["output_dir"])
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(tree))
    command = [sys.executable, "-P", "-m", "rlattn.cli", "train", str(config)]
    subprocess.run(command, check=True, timeout=timeout_s)
    return steps_of(tree)


def steps_of(tree: dict[str, Any]) -> list[dict[str, float]]:
    """The steps that a run has logged."""
    from rlattn.tracking import read_metrics

    sequences = tree["trainer"]["prompts_per_step"] * tree["rollout"]["num_generations"]
    return [
        {
            "step": line["step"],
            "seconds": line["timing_s/step"],
            "tokens": line["completions/mean_length"] * sequences,
            "length": line["completions/mean_length"],
            "loss": line["loss"],
            "apart": line["sampling/sampling_logp_difference/mean"],
            "sent_gb_per_second": line.get("perf/sent_mib_per_second", 0.0) * 2**20 / 1e9,
            "engines_lost": line["rollout/engines_lost"],
        }
        | {phase: line.get(f"timing_s/{phase}", 0.0) for phase in PHASES}
        for line in read_metrics(Path(tree["output_dir"]))
        if line["step"] > 0
    ]
