"""The couplings table: how often peaks of the signals go together, against chance [Li 2026, Table 2]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlattn.analysis.bootstrap import Interval, Sums, interval, ratio
from rlattn.analysis.config import PeaksConfig
from rlattn.analysis.measure import Array, Selected
from rlattn.analysis.peaks import Positions, fai_length, peaks_of


@dataclass(frozen=True)
class Coupling:
    """One row of a table.

    Attributes:
        name: what goes together.
        observed: share of peaks that do (or mean entropy at peaks, nats).
        chance: the same were the peaks anywhere (or the mean entropy of all tokens).
        lift: observed / chance.
        peaks: how many peaks the share is of.
    """

    name: str
    observed: Interval
    chance: Interval
    lift: Interval
    peaks: int


@dataclass(frozen=True)
class ResponsePeaks:
    """Peaks of one response of R tokens.

    Attributes:
        length: R.
        fai_length: its first positions, where FAI is defined; FAI's peaks lie among them.
        waad: positions of WAAD's peaks.
        fai: of the global heads' FAI.
        receiver: of the receiver heads' FAI.
    """

    length: int
    fai_length: int
    waad: Positions
    fai: Positions
    receiver: Positions


def response_peaks(signals: Selected, config: PeaksConfig, fai_low: int) -> list[ResponsePeaks]:
    """The peaks of every response."""
    found = []
    for waad, fai, receiver in zip(signals.waad, signals.fai, signals.receiver_fai, strict=True):
        own = fai_length(len(waad), fai_low)
        peaks = (peaks_of(values, config.prominence) for values in (waad, fai[:own], receiver[:own]))
        found.append(ResponsePeaks(len(waad), own, *peaks))
    return found


def meet(peaks: Positions, anchors: Positions, offsets: Iterable[int], length: int) -> tuple[float, float]:
    """(hits, hits expected by chance) of one response.

    A peak at t is a hit if t - o is an anchor for one of the offsets o. Chance moves each peak to a uniformly drawn one
    of the positions where a peak can be, 1..length-2, and leaves the anchors: the exact expectation, which is also the
    mean over all circular shifts of the peaks.
    """
    near = np.zeros(length, dtype=bool)
    for offset in offsets:
        moved = anchors + offset
        near[moved[(moved >= 0) & (moved < length)]] = True
    return float(near[peaks].sum()), len(peaks) * float(near[1:-1].mean()) if len(peaks) else 0.0


def share(name: str, sets: Sequence[tuple[Positions, Positions, int]], offsets: Sequence[int], seed: int) -> Coupling:
    """The share of peaks that meet an anchor, over all responses; `sets` are (peaks, anchors, length) of each."""
    hits, expected = np.array([meet(peaks, anchors, offsets, length) for peaks, anchors, length in sets]).T
    counts = np.array([len(peaks) for peaks, _, _ in sets])
    parts = (ratio(hits, counts, seed), ratio(expected, counts, seed), ratio(hits, expected, seed))
    return Coupling(name, *parts, int(counts.sum()))


def receiver_sets(peaks: Sequence[ResponsePeaks]) -> list[tuple[Positions, Positions, int]]:
    """Receiver-head FAI peaks against global-head FAI peaks."""
    return [(p.receiver, p.fai, p.fai_length) for p in peaks]


def rhythm_sets(peaks: Sequence[ResponsePeaks]) -> list[tuple[Positions, Positions, int]]:
    """FAI peaks against WAAD peaks."""
    return [(p.fai, p.waad, p.fai_length) for p in peaks]


def couplings(
    peaks: Sequence[ResponsePeaks], entropy: Sequence[Array], config: PeaksConfig, seed: int
) -> list[Coupling]:
    """The three rows of the table, for one selection of layers."""
    near = range(-config.coincide, config.coincide + 1)
    return [
        entropy_at_peaks(peaks, entropy, seed),
        share("receiver at a global FAI peak", receiver_sets(peaks), near, seed),
        share("FAI at or after a WAAD peak", rhythm_sets(peaks), range(config.follow + 1), seed),
    ]


def entropy_at_peaks(peaks: Sequence[ResponsePeaks], entropy: Sequence[Array], seed: int) -> Coupling:
    """Mean predictive entropy of the tokens at WAAD peaks, against that of all response tokens, nats."""
    columns = np.array(
        [
            (own[p.waad].sum(dtype=np.float64), len(p.waad), own.sum(dtype=np.float64), len(own))
            for p, own in zip(peaks, entropy, strict=True)
        ]
    ).T
    at, all_, lift = (interval(columns, statistic, seed) for statistic in _ENTROPY)
    return Coupling("entropy at WAAD peaks", at, all_, lift, int(columns[1].sum()))


_ENTROPY: tuple[Callable[[Sums], Sums], ...] = (
    lambda s: s[0] / s[1],
    lambda s: s[2] / s[3],
    lambda s: (s[0] / s[1]) / (s[2] / s[3]),
)
