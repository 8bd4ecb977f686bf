"""CISPO: the importance ratio is capped and taken as a constant, so that no token loses its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.inputs import Clipped, LossInputs


def cispo(inputs: LossInputs, log_ratio: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Clipped]:
    """-min(r, epsilon_high) A log pi with the ratio detached, [n] fp32 (arXiv 2506.13585, eq. 4-5).

    `epsilon_high` is the cap itself, as in TRL. A token counts as clipped where the cap lowers its ratio.
    """
    cap, ratio = algorithm.epsilon_high, torch.exp(log_ratio).detach()
    assert cap is not None
    loss = -ratio.clamp(max=cap) * inputs.advantages * inputs.logps.float()
    return loss, Clipped(torch.zeros_like(ratio, dtype=torch.bool), (ratio > cap) & (inputs.advantages > 0))
