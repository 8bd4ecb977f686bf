"""REINFORCE++: advantages normalised over the whole batch (arXiv 2501.03262)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.estimators.grpo import EPSILON, group_relative


def reinforce_plus_plus(rewards: Tensor, group_ids: Tensor, scale_rewards: str) -> tuple[Tensor, dict[str, float]]:
    """A = (reward - mean of the batch) / (std of the batch + 1e-4); without a divisor for `none` (eq. 4 there).

    Arguments and metrics as in `group_relative`. Needs no groups: `rollout.num_generations` may be anything.
    """
    metrics = group_relative(rewards, group_ids, scale_rewards)[1]
    return _normalised(rewards.double(), scale_rewards), metrics


def reinforce_plus_plus_baseline(
    rewards: Tensor, group_ids: Tensor, scale_rewards: str
) -> tuple[Tensor, dict[str, float]]:
    """The same after the mean of its group was taken from each reward (the paper's variant for reasoning)."""
    centred, metrics = group_relative(rewards, group_ids, "none")
    return _normalised(centred.double(), scale_rewards), metrics


def _normalised(values: Tensor, scale_rewards: str) -> Tensor:
    centred = values - values.mean()
    std = values.std() if len(values) > 1 else torch.zeros((), dtype=values.dtype)
    return (centred if scale_rewards == "none" else centred / (std + EPSILON)).float()
