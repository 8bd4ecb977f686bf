"""The per-token KL to a reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.losses.inputs import same_shape


def kl_k3(logps: Tensor, reference_logps: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """Per-token KL to the reference, [n] fp32: r (e^d - d - 1) with d = reference_logps - logps; never negative.

    e^d - d - 1 is the k3 estimator (J. Schulman, "Approximating KL divergence", 2020; arXiv 2402.03300, eq. 4). Its
    gradient is that of the reverse KL only with the importance ratio r, whose own gradient counts even where r is 1
    (arXiv 2512.02556); TRL applies r by default (`use_bias_correction_kl`).

    Args:
        logps: [n] under the policy being updated; gradients flow here.
        reference_logps: [n] under the reference policy.
        log_ratio: [n], log of r, with gradients; None leaves r out.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(logps=logps, reference_logps=reference_logps, log_ratio=logps if log_ratio is None else log_ratio)
    difference = reference_logps.float() - logps.float()
    kl = torch.exp(difference) - difference - 1
    return kl if log_ratio is None else kl * torch.exp(log_ratio)
