"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a batch of groups that teach something.

A group whose rewards are all equal has advantage 0 everywhere. Its place goes to another prompt's group, for a bounded
number of further draws; what is missing after the last is filled with such groups after all, so that a batch always has
its size.
"""

from __future__ import annotations

from collections.abc import Callable

from rlattn.types import Rollouts


def fill(draw: Callable[[int], Rollouts], groups: int, max_draws: int) -> tuple[Rollouts, dict[str, float]]:
    """Draw batches until `groups` groups have rewards that differ, at most `max_draws` times.

    Args:
        draw: gives the scored rollouts of draw i = 0, 1, ...
        groups: that the batch must have; the first draw has at least as many.
        max_draws: at least 1.

    Returns:
        the batch, groups in the order in which they were drawn; and `filter_groups/draws`, and
        `filter_groups/kept` (share of all drawn groups whose rewards differ).
    """
    drawn: list[Rollouts] = []
    kept: list[tuple[int, list[int]]] = []  # (draw, its sequences)
    spare: list[tuple[int, list[int]]] = []
    total = 0
    for index in range(max_draws):
        batch = draw(index)
        drawn.append(batch)
        for sequences in _groups(batch):
            differing = batch.rewards[sequences].unique().numel() > 1
            (kept if differing else spare).append((index, sequences))
            total += 1
        if len(kept) >= groups:
            break
    chosen = sorted((kept + spare)[:groups])  # by draw, then by place
    parts = [drawn[index].take(sequences) for index, sequences in chosen]
    return Rollouts.cat(parts), {"filter_groups/draws": float(len(drawn)), "filter_groups/kept": len(kept) / total}


def _groups(batch: Rollouts) -> list[list[int]]:
    places: dict[int, list[int]] = {}
    for sequence, group in enumerate(batch.group_ids.tolist()):
        places.setdefault(group, []).append(sequence)
    return list(places.values())
