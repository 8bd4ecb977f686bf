"""What clusters hold: predicted bytes per GPU for published shapes, beside those that an H100 measured.

    python -P benchmarks/sizing.py

Arithmetic alone, by `rlattn plan`; what was measured is read from benchmarks/results/policy_vs_trl.json.
Prints the tables of docs/cluster.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from rlattn.config import RunConfig
from rlattn.rollout.fit import NoRoom, alike
from rlattn.trainers.memory import GIB, estimate
from rlattn.trainers.sizing import study

RESULTS = Path(__file__).parent / "results"
GPU_GIB = 80
LENGTHS = {"max_prompt_length": 1024, "max_completion_length": 3072}


def qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=tied,
    )


LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128_256,
    tie_word_embeddings=False,
)
SHAPES: dict[str, PretrainedConfig] = {
    "0.6B": qwen3(1024, 3072, 28, 16, True),
    "4B": qwen3(2560, 9728, 36, 32, True),
    "8B": qwen3(4096, 12_288, 36, 32, False),
    "32B": qwen3(5120, 25_600, 64, 64, False),
    "70B": LLAMA_70B,
}
LAYOUTS = [  # shape, GPUs, policy ranks, engines, tensor parallel
    ("4B", 8, 4, 4, 1),
    ("8B", 8, 6, 2, 1),
    ("32B", 8, 4, 2, 2),
    ("4B", 64, 32, 32, 1),
    ("8B", 64, 32, 32, 1),
    ("32B", 64, 48, 8, 2),
    ("70B", 64, 48, 2, 8),
    ("4B", 512, 256, 256, 1),
    ("8B", 512, 256, 256, 1),
    ("32B", 512, 384, 64, 2),
    ("70B", 512, 384, 16, 8),
]
MEASURED = [("0.6B", "0.6b 1k-equal", None), ("4B", "4b 1k-equal", "bf16")]


def config(folder: str, ranks: int, engines: int, width: int, deepspeed: dict) -> RunConfig:
    policy = {"ranks": ranks, "gradient_checkpointing": True, "deepspeed": deepspeed}
    rollout = {"num_engines": engines, "tensor_parallel_size": width, "num_generations": 8, **LENGTHS}
    return RunConfig.model_validate(
        {"model": {"path": folder}, "policy": policy, "rollout": rollout, "trainer": {"prompts_per_step": 128}}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "sizing.json")
    out = parser.parse_args().out
    rows, compared = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            shape.save_pretrained(f"{folder}/{name}")
        for name, gpus, ranks, engines, width in LAYOUTS:
            made = config(f"{folder}/{name}", ranks, engines, width, {"zero_optimization": {"stage": 3}})
            needs = estimate(made)
            try:
                study(made, alike(gpus // 8, GPU=8, CPU=64), GPU_GIB)
                verdict = "fits"
            except NoRoom as error:
                verdict = str(error)
            rank = sum(needs.policy.values()) / GIB
            room = made.rollout.gpu_memory_utilization * GPU_GIB - needs.engine["weights"] / GIB
            token = needs.engine["KV cache"] / GIB / (128 * 8 / engines * 4096)
            rows.append(
                {
                    "shape": name,
                    "gpus": gpus,
                    "ranks": ranks,
                    "engines": engines,
                    "tensor_parallel": width,
                    "rank_gib": rank,
                    "engine_weights_gib": needs.engine["weights"] / GIB,
                    "sequences_at_once": max(0, int(room / token / 4096)),
                    "verdict": verdict,
                }
            )
        measured = json.loads((RESULTS / "policy_vs_trl.json").read_text())["cases"]
        for name, case, accumulated in MEASURED:
            block = {"zero_optimization": {"stage": 1}} | (
                {"data_types": {"grad_accum_dtype": accumulated}} if accumulated else {}
            )
            guess = sum(estimate(config(f"{folder}/{name}", 1, 1, 1, block)).policy.values()) / GIB
            found = measured[case]["ours"]["update"]["gib"]
            compared.append({"shape": name, "case": case, "predicted_gib": guess, "measured_gib": found})
    out.write_text(json.dumps({"layouts": rows, "compared": compared}, indent=1) + "\n")
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    for row in compared:
        print(f"{row['shape']}: {row['predicted_gib']:.1f} predicted, {row['measured_gib']:.1f} measured")


if __name__ == "__main__":
    main()
