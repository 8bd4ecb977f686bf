"""SAPO: a soft gate in place of a clip range."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.inputs import Clipped, LossInputs


def sapo(inputs: LossInputs, log_ratio: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Clipped]:
    """-4/tau sigmoid(tau (r - 1)) A, [n] fp32, tau by the sign of A (arXiv 2511.20347, eq. 5-6). Nothing is clipped."""
    positive = inputs.advantages > 0
    tau = torch.where(positive, algorithm.sapo_temperature_pos, algorithm.sapo_temperature_neg)
    gate = torch.sigmoid(tau * (torch.exp(log_ratio) - 1)) * 4 / tau
    none = torch.zeros_like(positive)
    return -gate * inputs.advantages, Clipped(none, none)
