"""Scoring completions with the task's verifier."""

from __future__ import annotations

import torch

from rlattn.config import RunConfig
from rlattn.overlong import overlong_penalty
from rlattn.tasks import Task
from rlattn.types import Rollouts
from rlattn.verifiers.pool import VerifierPool, judge_all


def score(rollouts: Rollouts, task: Task, pool: VerifierPool, config: RunConfig) -> Rollouts:
    """Rollouts with `reward_parts` and their sum `rewards` filled in.

    Parts are accuracy and those of the verdicts, 0 where a verdict lacks one; with `algorithm.overlong_buffer_tokens`
    also `overlong`. `pool` judges where the verifier does not bound itself.
    """
    pairs = [(problem.answer, text) for problem, text in zip(rollouts.problems, rollouts.texts, strict=True)]
    rows = [{"accuracy": float(verdict.right), **verdict.parts} for verdict in judge_all(task, pairs, pool)]
    names = dict.fromkeys(name for row in rows for name in row)  # a verifier that was ended gives no parts of its own
    parts = {name: torch.tensor([row.get(name, 0.0) for row in rows], dtype=torch.float32) for name in names}
    algorithm = config.algorithm
    if buffer := algorithm.overlong_buffer_tokens:
        penalty = overlong_penalty(rollouts.response_lengths, config.rollout.max_completion_length, buffer)
        parts["overlong"] = algorithm.overlong_penalty * penalty
    return rollouts.replace(rewards=torch.stack(list(parts.values())).sum(0), reward_parts=parts)
