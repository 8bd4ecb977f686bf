"""REINFORCE leave-one-out: the baseline of an answer is the mean reward of the group's others (arXiv 2402.14740)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.estimators.grpo import group_relative


def rloo(rewards: Tensor, group_ids: Tensor, scale_rewards: str) -> tuple[Tensor, dict[str, float]]:
    """A = reward - mean of the others' = (reward - mean of the group) n / (n - 1); a group of one has advantage 0.

    Arguments and metrics as in `group_relative`; `scale_rewards` divides by the same deviations, `none` is the paper.
    """
    advantages, metrics = group_relative(rewards, group_ids, scale_rewards)
    groups = torch.unique(group_ids, return_inverse=True)[1]  # [B]
    size = torch.bincount(groups)[groups].double()  # [B]
    return (advantages.double() * size / (size - 1).clamp(min=1)).float(), metrics
