"""The clipped surrogate of PPO, with DAPO's two clip ranges and a second, upper clip (dual clip)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.inputs import Clipped, LossInputs


def clip(inputs: LossInputs, log_ratio: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Clipped]:
    """-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A), [n] fp32.

    Proximal policy optimisation (arXiv 1707.06347, eq. 7); two clip ranges as in DAPO (arXiv 2503.14476, eq. 10);
    `delta` bounds what a very likely token of negative advantage can cost (arXiv 1912.09729; TRL's two-sided clipping,
    arXiv 2505.07291).
    """
    low, high = 1 - algorithm.epsilon, 1 + (algorithm.epsilon_high or algorithm.epsilon)
    ratio, advantages = torch.exp(log_ratio), inputs.advantages
    bounded = ratio if algorithm.delta is None else ratio.clamp(max=algorithm.delta)
    loss = -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)
    return loss, Clipped((ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0))
