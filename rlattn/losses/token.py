"""The loss of a micro-batch: objective, correction, KL and entropy bonus, weighted and summed."""

from __future__ import annotations

from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.correction import engine_ratio
from rlattn.losses.inputs import LossInputs
from rlattn.losses.kl import kl_k3
from rlattn.losses.ratios import LOG_RATIOS
from rlattn.objectives import OBJECTIVES, clip


def micro_batch_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """What a micro-batch adds to the loss of its optimizer step, and what to log of it.

    Returns:
        the loss, a scalar with gradients (0 of no tokens); and metric name -> [n] values, whose mean over the counted
        tokens of the step is the metric.
    """
    log_ratio = LOG_RATIOS[algorithm.importance_sampling_level](inputs)
    objective = OBJECTIVES.get(algorithm.loss_type, clip)
    token_loss, clipped = objective(inputs, log_ratio, algorithm)
    measured = {"clip_ratio/low_mean": clipped.low, "clip_ratio/high_mean": clipped.high}
    if algorithm.vllm_importance_sampling_correction:
        ratio = engine_ratio(inputs, algorithm)
        measured["sampling/corrected_ratio_mean"] = ratio
        if algorithm.loss_type != "vespo":  # which has the engine's ratio in its own
            token_loss = token_loss * ratio
    if algorithm.beta:
        assert inputs.reference_logps is not None
        kl = kl_k3(inputs.logps, inputs.reference_logps, log_ratio)
        token_loss = token_loss + algorithm.beta * kl
        measured["kl"] = kl.detach()
    loss = (inputs.weights * token_loss).sum()
    if algorithm.entropy_coef:
        assert inputs.entropy is not None
        assert inputs.mean_weights is not None
        # A mean over tokens, whatever weights the policy's own loss has, as in TRL.
        loss = loss - algorithm.entropy_coef * (inputs.mean_weights * inputs.entropy).sum()
    return loss, measured
