"""Scoring completions with the task's verifier, and what an algorithm adds to that."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import RunConfig
from rlattn.overlong import overlong_penalty
from rlattn.tasks import Task
from rlattn.types import Rollouts
from rlattn.verifiers.pool import VerifierPool, judge_all


def judge(rollouts: Rollouts, task: Task, pool: VerifierPool) -> Rollouts:
    """Rollouts with `reward_parts` (accuracy and the verdicts' parts, 0 where a verdict lacks one) and their sum
    `rewards` filled in. `pool` judges where the verifier does not bound itself."""
    pairs = [(problem.answer, text) for problem, text in zip(rollouts.problems, rollouts.texts, strict=True)]
    rows = [{"accuracy": float(verdict.right), **verdict.parts} for verdict in judge_all(task, pairs, pool)]
    names = dict.fromkeys(name for row in rows for name in row)  # a verifier that was ended gives no parts of its own
    parts = {name: torch.tensor([row.get(name, 0.0) for row in rows], dtype=torch.float32) for name in names}
    return with_parts(rollouts, parts)


def overlong(rollouts: Rollouts, config: RunConfig) -> dict[str, Tensor]:
    """The part `overlong` [B] of a training reward, none without `algorithm.overlong_buffer_tokens`."""
    algorithm = config.algorithm
    if not algorithm.overlong_buffer_tokens:
        return {}
    limit = config.rollout.max_completion_length
    penalty = overlong_penalty(rollouts.response_lengths, limit, algorithm.overlong_buffer_tokens)
    return {"overlong": algorithm.overlong_penalty * penalty}


def with_parts(rollouts: Rollouts, parts: dict[str, Tensor]) -> Rollouts:
    """Rollouts with further parts [B] of the reward; `rewards` is the sum of all."""
    whole = rollouts.reward_parts | parts
    return rollouts.replace(rewards=torch.stack(list(whole.values())).sum(0), reward_parts=whole)
