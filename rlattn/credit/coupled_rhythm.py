"""Coupled rhythm credit: pay anchors, and let those that only echo a jump share with the token that made it.

[Li 2026, eq. 18-19]. [R] tokens of one response.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals
from rlattn.credit.selection import amplify, least_of_top, select, waad_change


def coupled_rhythm(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32 [Li 2026, eq. 19]; a token that is both anchor and introduction gets both terms.

    An anchor is locally dominated when its WAAD is at most the `tau_waad` quantile and the largest Δ among the
    `window` tokens before it is at least τ_Δ; that token (ties: the nearest) introduces it. One token that introduces
    several anchors is paid once. `which: bottom` picks the anchors of smallest FAI and leaves the rest as it is.
    """
    bonus = config.amplification - 1
    anchor = select(response.fai, config.top_q, config.which)  # T
    dominated, intro = _dominated(anchor, response.waad, config)  # D, I(D)
    gamma = amplify(anchor, config.amplification).numpy()
    gamma[dominated] = 1 + (1 - config.alpha) * bonus
    gamma[intro] += config.alpha * bonus  # once, however often it is named
    return torch.from_numpy(gamma)


def _dominated(anchor: Tensor, waad: Tensor, config: CreditConfig) -> tuple[np.ndarray, np.ndarray]:
    """The locally dominated anchors, and the token that introduces each: indices in the response."""
    change, distance = waad_change(waad).numpy(), waad.numpy()
    if config.tau_delta is None:
        jump = least_of_top(change, config.top_q)
    else:
        jump = torch.quantile(torch.from_numpy(change), config.tau_delta).item()
    # At most the quantile, which lies between two values of WAAD, is at most the lower one.
    rank = math.floor(config.tau_waad * (len(waad) - 1) + 1e-9)
    candidates = np.flatnonzero(anchor.numpy() & (distance <= np.partition(distance, rank)[rank]))
    before = candidates[:, None] - np.arange(1, config.window + 1)  # [|candidates|, k], the nearest first
    changes = np.where(before >= 0, change[before.clip(0)], -np.inf)
    largest = np.arange(len(candidates)), changes.argmax(1)  # the first of equals
    led = changes[largest] >= jump
    return candidates[led], before[largest][led]
