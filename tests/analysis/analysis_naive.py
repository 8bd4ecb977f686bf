"""Definitions written out, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch


def naive_peaks(values, share=0.5):
    """Local maxima whose prominence is at least `share` standard deviations: the height above the higher of the two
    lowest points on the ways to higher ground (or to an end)."""
    values = np.asarray(values, dtype=np.float64)
    found = []
    for t in range(1, len(values) - 1):
        if not values[t - 1] < values[t] > values[t + 1]:
            continue
        bases = []
        for way in (range(t - 1, -1, -1), range(t + 1, len(values))):
            lowest = values[t]
            for s in way:
                if values[s] > values[t]:
                    break
                lowest = min(lowest, values[s])
            bases.append(lowest)
        if values[t] - max(bases) >= share * values.std():
            found.append(t)
    return found


@torch.no_grad()
def naive_greedy(model, ids, count, end):
    """Greedy continuation without cache or padding; `model` runs eager attention."""
    ids, written = list(ids), []
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        written.append(token)
        if token in end:
            break
    return written
