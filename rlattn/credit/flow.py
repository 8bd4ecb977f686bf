"""Flow credit: pay the tokens through which what the answer is made of passes [Dong 2026, FlowTracer, 2606.10646]."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals, needs
from rlattn.credit.selection import amplify, select


@needs("flow")
def flow(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32: g on TopQ(throughput, q), 1 elsewhere.

    A response through which nothing flows (no answer and `signals.flow.fallback_tokens` is 0, or every edge to the
    answer cut) has no ranking, and nothing is amplified.
    """
    throughput = response.extra["flow"]
    if not throughput.any():
        return torch.ones_like(throughput)
    return amplify(select(throughput, config.top_q, config.which), config.amplification)
