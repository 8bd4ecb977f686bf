"""Ratios of sums over responses with bootstrap intervals. [n] responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
LEVEL = 0.95

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; NaN where it is undefined, such as a share of no peaks."""

    value: float
    low: float
    high: float


def interval(columns: ArrayLike, statistic: Callable[[Sums], Sums], seed: int) -> Interval:
    """`statistic` of summed columns, with its percentile bootstrap interval over responses.

    Responses are what is drawn at random: tokens of one response are alike. The same seed and number of responses draw
    the same responses, so intervals of several statistics go together.

    Args:
        columns: [k, n], what each response adds to each of k sums.
        statistic: [k, m] sums -> [m] values.
        seed: of the draws.
    """
    columns = np.asarray(columns, dtype=np.float64)
    n = columns.shape[1]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # [draws, n]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(columns.sum(1)[:, None])[0])
        draws = statistic(columns @ weights.T)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def ratio(above: ArrayLike, below: ArrayLike, seed: int) -> Interval:
    """sum(above) / sum(below) over [n] responses."""
    return interval(np.stack([np.asarray(above), np.asarray(below)]), lambda sums: sums[0] / sums[1], seed)
