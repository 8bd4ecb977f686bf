"""Peaks of a per-token signal, and where an FAI peak can be at all. [R] tokens of one response."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

Values = NDArray[np.floating]
Positions = NDArray[np.int64]


def peaks_of(values: Values, prominence: float) -> Positions:
    """Local maxima of [R] values that stand out by `prominence` standard deviations; neither end is a peak."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 3:
        return np.empty(0, dtype=np.int64)
    return find_peaks(values, prominence=prominence * values.std())[0].astype(np.int64)


def fai_length(length: int, fai_low: int) -> int:
    """How many of a response's first positions have an FAI: behind them no row is far enough (T(s) of eq. 10 is empty).

    Peaks are looked for among these alone: behind them FAI is 0 by definition, not by what attention does.
    """
    return max(0, length - fai_low)
