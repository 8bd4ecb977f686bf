"""VESPO: a smooth weight on the sequence's importance ratio in place of a clip range."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.correction import engine_ratio
from rlattn.losses.inputs import Clipped, LossInputs

LOWEST, HIGHEST = log(1e-8), 20.0  # bounds on log ratios, the authors' and TRL's


def vespo(inputs: LossInputs, log_ratio: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Clipped]:
    """-phi(w) A log pi, [n] fp32, phi(w) = e^lambda w^k e^(-lambda w) detached (arXiv 2602.10693).

    w is the product of the sequence's token ratios, the engine's correction among them; k and lambda go by the sign of
    A. `log_ratio` is not read: the level is the sequence. Nothing is clipped.
    """
    with torch.no_grad():
        log_w = inputs.sequence_sum((inputs.logps.float() - inputs.old_logps.float()).clamp(-20.0, 20.0))
        if algorithm.vllm_importance_sampling_correction:
            log_w = log_w + inputs.sequence_sum(engine_ratio(inputs, algorithm).log().clamp(LOWEST, HIGHEST))
        log_w = log_w.clamp(LOWEST, HIGHEST)
        positive = inputs.advantages >= 0
        k = torch.where(positive, algorithm.vespo_k_pos, algorithm.vespo_k_neg)
        rate = torch.where(positive, algorithm.vespo_lambda_pos, algorithm.vespo_lambda_neg)
        phi = torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    none = torch.zeros_like(positive)
    return -phi * inputs.advantages * inputs.logps.float(), Clipped(none, none)
