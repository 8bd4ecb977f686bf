"""Random models of Qwen3's shapes, for benchmarks that need no weights that know anything."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def vocabulary(shape: str) -> int:
    """Tokens that a shape knows."""
    return 512 if shape == "tiny" else 151_936


def make_model(shape: str) -> Qwen3ForCausalLM:
    """On the GPU in bf16 where there is one, else in fp32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[shape],
        num_key_value_heads=2 if shape == "tiny" else 8,
        head_dim=32 if shape == "tiny" else 128,
        vocab_size=vocabulary(shape),
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def save_model(shape: str, folder: str | Path) -> None:
    """Made anew, written as a Hugging Face folder, and gone from the GPU."""
    make_model(shape).save_pretrained(folder)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
