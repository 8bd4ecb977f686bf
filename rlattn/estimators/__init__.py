"""Estimators: rewards of a batch to one advantage a sequence, before credit; one short file each.

[B] sequences.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.estimators.grpo import group_relative
from rlattn.estimators.reinforce_plus_plus import reinforce_plus_plus, reinforce_plus_plus_baseline
from rlattn.estimators.rloo import rloo

Estimator = Callable[[Tensor, Tensor, str], tuple[Tensor, dict[str, float]]]
"""(rewards [B] fp32, group_ids [B] int64, scale_rewards) -> (advantages [B] fp32, metrics)."""

ESTIMATORS: dict[str, Estimator] = {
    "grpo": group_relative,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


def estimate(rewards: Tensor, group_ids: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, float]]:
    """Advantages [B] fp32 by `algorithm.estimator`, and the metrics of `rlattn.estimators.grpo.group_relative`.

    Raises:
        ValueError: lengths differ, or a reward is missing or infinite.
    """
    return ESTIMATORS[algorithm.estimator](rewards, group_ids, algorithm.scale_rewards)


__all__ = ["ESTIMATORS", "Estimator", "estimate", "group_relative", "reinforce_plus_plus", "rloo"]
