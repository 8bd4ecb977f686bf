"""A tiny model with a character tokenizer, and one whole analysis of it by the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves a test's folder off the path

from rlattn.cli import main
from tests.make import tiny_qwen3
from tests.rollout.rollout_tiny import make_tokenizer

SETTINGS = ["task.options.prompt=compact", "generation.max_tokens=48", "perturbation.max_tokens=8"]
COUNT = 6


def tiny_model(layers: int = 6):
    """Wide-spread weights: attention is far from even, and two prefixes rarely have the same next token."""
    return tiny_qwen3(
        vocab_size=97,
        num_hidden_layers=layers,
        initializer_range=0.3,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=1,
    ).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def analysed(tmp_path_factory, model_path):
    """Results folder of `rlattn analyze`."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert (
        main(["analyze", str(model_path), "--task", "countdown", "-n", str(COUNT), "--out", str(out), *SETTINGS]) == 0
    )
    return out
