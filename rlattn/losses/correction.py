"""Importance sampling correction for the difference between engine and trainer: the same weights, other kernels."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.inputs import LossInputs


def engine_ratio(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    """[n], trainer's over engine's probability before the update, truncated or masked; no gradients.

    Token level as in truncated importance sampling (Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training", 2025), sequence level by the product over a sequence's tokens; modes and bounds are TRL's.
    """
    assert inputs.sampled_logps is not None
    difference = (inputs.old_logps.float() - inputs.sampled_logps.float()).detach()
    level, way = algorithm.vllm_importance_sampling_mode.split("_")
    ratio = torch.exp(inputs.sequence_sum(difference) if level == "sequence" else difference)
    low, high = algorithm.vllm_importance_sampling_clip_min, algorithm.vllm_importance_sampling_clip_max
    low, high = 0.0 if low is None else low, inf if high is None else high
    if way == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
