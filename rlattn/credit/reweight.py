"""Baseline: advantage reweighting, which damps the gradient of improbable tokens (Yang et al., arXiv 2505.12929)."""

from __future__ import annotations

from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals


def reweight(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32: a π(o_t) + 1 - a with a = `reweight_alpha`; `which` makes no difference.

    π is the probability of the sampled token before the update, at the sampling temperature. Without the source's
    second part (Lopti: separate updates of improbable tokens), which no factor on advantages can express. At most 1
    everywhere: compare at equal total weight with `normalize`.
    """
    return 1 + config.reweight_alpha * (response.logps.exp() - 1)
