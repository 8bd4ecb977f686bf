"""Coupled rhythm credit: pay anchors, and let those that only echo a jump share with the token that made it.

[Li 2026, eq. 18-19]. [R] tokens of one response.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals
from rlattn.credit.selection import amplify, budget, select, waad_change


def coupled_rhythm(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32 [Li 2026, eq. 19]; a token that is both anchor and introduction gets both terms.

    An anchor is locally dominated when its WAAD is at most the `tau_waad` quantile and the largest Δ among the
    `window` tokens before it is at least τ_Δ; that token (ties: the nearest) introduces it. One token that introduces
    several anchors is paid once. `which: bottom` picks the anchors of smallest FAI and leaves the rest as it is.
    """
    bonus = config.amplification - 1
    anchor = select(response.fai, config.top_q, config.which)  # T
    dominated, intro = _dominated(anchor, response.waad, config)  # D, I(D)
    gamma = amplify(anchor & ~dominated, config.amplification)
    return gamma + (1 - config.alpha) * bonus * dominated + config.alpha * bonus * intro


def _dominated(anchor: Tensor, waad: Tensor, config: CreditConfig) -> tuple[Tensor, Tensor]:
    """Which anchors are locally dominated, and which tokens introduce them: two masks [R] bool."""
    change = waad_change(waad)  # [R]
    if config.tau_delta is None:
        jump = change.topk(budget(config.top_q, len(change))).values[-1]  # the least change inside TopQ(Δ, q)
    else:
        jump = torch.quantile(change, config.tau_delta)
    # One pooling over t-k..t-1 gives the largest and where it is; it takes the first of equals, so it goes backwards.
    before = pad(change[:-1], (config.window, 0), value=-torch.inf).flip(0)  # nothing precedes the response
    largest, place = max_pool1d(before[None], config.window, stride=1, return_indices=True)
    largest, source = largest[0].flip(0), (len(change) - 2 - place[0]).flip(0)  # [R], [R]
    # At most the quantile, which lies between two values of WAAD, is at most the lower one.
    lower = waad.kthvalue(1 + math.floor(config.tau_waad * (len(waad) - 1) + 1e-9)).values
    dominated = anchor & (waad <= lower) & (largest >= jump)
    intro = torch.zeros_like(anchor)
    intro[source[dominated]] = True
    return dominated, intro
