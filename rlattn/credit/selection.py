"""What strategies share: choosing a share of a response's tokens, and changes of WAAD. [R] tokens of one response."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def budget(share: float, length: int) -> int:
    """ceil(share * length), the size of TopQ; at least 1 where there is a token."""
    # 0.07 * 100 is 7.000000000000001 in binary: a product this close to an integer is meant to be that integer.
    return min(length, max(1, math.ceil(share * length - 1e-9)))


def least_of_top(values: np.ndarray, share: float) -> float:
    """The smallest of TopQ(values, share), of at least one value."""
    size = budget(share, len(values))
    return float(np.partition(values, -size)[-size])


def select(values: Tensor, share: float, which: str = "top") -> Tensor:
    """TopQ(values, share) as a mask [R] bool: the largest values ("bottom": the smallest), ties to the lower index.

    `values` [R] are on the CPU, where a response is too short for torch: most of its time would be overhead.
    """
    own = values.numpy() if which == "top" else -values.numpy()
    if not len(own):
        return torch.zeros(0, dtype=torch.bool)
    least = least_of_top(own, share)
    chosen = own > least
    ties = np.flatnonzero(own == least)
    chosen[ties[: budget(share, len(own)) - np.count_nonzero(chosen)]] = True
    return torch.from_numpy(chosen)


def amplify(chosen: Tensor, amplification: float) -> Tensor:
    """Gamma [R] fp32: `amplification` on chosen tokens, 1 elsewhere."""
    return torch.where(chosen, amplification, 1.0).float()


def waad_change(waad: Tensor) -> Tensor:
    """Δ_t = |WAAD_t - WAAD_{t+1}| [R]; the last token, which has no successor, gets 0 [Li 2026, eq. 14]."""
    distance = waad.numpy()
    change = np.zeros_like(distance)
    np.abs(distance[:-1] - distance[1:], out=change[:-1])
    return torch.from_numpy(change)
