"""The order of training prompts: a pure function of seed and step, so that resuming needs the same problems only."""

from __future__ import annotations

import json
import zlib
from functools import lru_cache

import numpy as np

from rlattn.config import ConfigError
from rlattn.problem import Problem


class PromptSchedule:
    """Endless epochs over `problems`, each a fresh permutation, read `batch` at a time; no remainder is dropped."""

    def __init__(self, problems: list[Problem], batch: int, seed: int) -> None:
        self.problems, self.batch, self.seed = problems, batch, seed

    def at(self, step: int) -> list[Problem]:
        """The prompts of step `step` (counted from 0)."""
        size = len(self.problems)
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self.problems[_permutation(self.seed, i // size, size)[i % size]] for i in places]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def fingerprint(problems: list[Problem]) -> str:
    """Eight hex digits a problem (CRC-32 of what it says), in order."""
    return "".join(f"{zlib.crc32(json.dumps([p.id, p.prompt, p.answer], default=str).encode()):08x}" for p in problems)


def check_same(saved: str, now: str) -> None:
    """Refuse to resume on other training problems, given both fingerprints.

    Raises:
        ConfigError: names the first problem that differs.
    """
    if saved == now:
        return
    was, are = len(saved) // 8, len(now) // 8
    first = next((i for i in range(min(was, are)) if saved[8 * i : 8 * i + 8] != now[8 * i : 8 * i + 8]), min(was, are))
    raise ConfigError(
        f"the training problems are not those that the run began with ({was} then, {are} now): number {first + 1} is "
        "the first that differs; restore the data, or start another run"
    )
