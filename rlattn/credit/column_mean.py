"""Baseline: pay the tokens that later ones look back to, averaged over all heads: what head groups buy."""

from __future__ import annotations

from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals, needs
from rlattn.credit.selection import amplify, select


@needs("fai_all")
def column_mean(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32: g on TopQ(attention's column mean over every captured head, q), 1 elsewhere.

    The horizon is FAI's, so that nothing but the heads differs from `global_anchor`.
    """
    return amplify(select(response.extra["fai_all"], config.top_q, config.which), config.amplification)
