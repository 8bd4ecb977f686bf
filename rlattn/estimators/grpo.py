"""Group-relative advantages, normalised as TRL's `GRPOTrainer` does. [B] sequences."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's guard against a standard deviation of zero


def group_relative(rewards: Tensor, group_ids: Tensor, scale_rewards: str) -> tuple[Tensor, dict[str, float]]:
    """A = (reward - mean of its group) / (std + 1e-4), with the unbiased std of the group or batch, or no divisor.

    Groups may have any size and lie in any order; a group of one has advantage 0.

    Args:
        rewards: [B] fp32, finite.
        group_ids: [B] int64, equal for answers to one prompt.
        scale_rewards: `group`, `batch` or `none`.

    Returns:
        advantages [B] fp32, and TRL's `reward`, `reward_std` (over the batch) and `frac_reward_zero_std` (share of
        sequences whose group, or with `batch` whose batch, has rewards that are all equal).

    Raises:
        ValueError: lengths differ, a reward is missing (NaN) or infinite, there is none, or an unknown scaling.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape or not len(rewards):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must be one value per sequence each"
        )
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"reward of sequence {bad} is {rewards[bad].item()}; every sequence needs a finite reward")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r} must be group, batch or none")
    values = rewards.double()  # equal rewards must have a mean that equals them, to the bit
    groups = torch.unique(group_ids, return_inverse=True)[1]  # [B]
    size = torch.bincount(groups)  # [G]
    centred = values - (torch.bincount(groups, values) / size)[groups]
    batch_std = values.std() if len(values) > 1 else values.new_zeros(())
    if scale_rewards == "batch":
        std = batch_std.expand_as(values)
    else:
        std = (torch.bincount(groups, centred.square()) / (size - 1).clamp(min=1)).sqrt()[groups]
    advantages = centred if scale_rewards == "none" else centred / (std + EPSILON)
    return advantages.float(), {
        "reward": values.mean().item(),
        "reward_std": batch_std.item(),
        "frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).double().mean().item(),
    }
