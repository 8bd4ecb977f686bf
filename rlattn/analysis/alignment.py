"""Peak alignment: does a peak's partner stand at the same, the previous or the next token? [Li 2026, Table 20]."""

from __future__ import annotations

from collections.abc import Sequence

from rlattn.analysis.couplings import Coupling, ResponsePeaks, receiver_sets, rhythm_sets, share

OFFSETS = {"exact": 0, "previous": 1, "next": -1}
"""The partner of a peak at t is at t - offset."""


def alignment(peaks: Sequence[ResponsePeaks], seed: int) -> dict[str, list[Coupling]]:
    """For FAI peaks and WAAD peaks, and for receiver and global FAI peaks: the share at each of `OFFSETS`."""
    pairs = {"WAAD peak near an FAI peak": rhythm_sets(peaks), "global near a receiver FAI peak": receiver_sets(peaks)}
    return {
        pair: [share(name, sets, [offset], seed) for name, offset in OFFSETS.items()] for pair, sets in pairs.items()
    }
