"""Accuracy on a task's test set."""

from __future__ import annotations

from collections.abc import Callable

from rlattn import rewards
from rlattn.problem import Problem
from rlattn.tasks import Task
from rlattn.types import Rollouts
from rlattn.verifiers.pool import VerifierPool

Generate = Callable[[list[Problem], int], Rollouts]


def evaluate(
    task: Task, generate: Generate, samples: int, verifiers: VerifierPool, name: str = "eval"
) -> dict[str, float]:
    """avg@k of the verdicts over the test set, with k = `samples` completions a problem; metrics begin with `name`."""
    rollouts = rewards.judge(generate(task.test, samples), task, verifiers)
    return {
        f"{name}/accuracy": rollouts.reward_parts["accuracy"].mean().item(),
        f"{name}/reward": rollouts.rewards.mean().item(),
        f"{name}/mean_length": rollouts.response_lengths.float().mean().item(),
        f"{name}/clipped_ratio": rollouts.truncated.float().mean().item(),
    }
