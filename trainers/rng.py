"""A process's random number generators: Python's, NumPy's and torch's, on the CPU and the GPU."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch


def save_rng(path: Path) -> None:
    """Write the states of this process's generators; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global one, which libraries draw from
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, path)


def load_rng(path: Path) -> None:
    """Give this process's generators the states of a file that `save_rng` wrote."""
    states = torch.load(path, weights_only=False)  # NumPy's and Python's are tuples that the safe reader refuses
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_rng(*key: int) -> None:
    """Seed this process's generators from what tells it from others, such as (seed, step, rank)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
