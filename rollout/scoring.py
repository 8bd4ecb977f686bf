"""Attention signals of a batch from the engines that sampled it.

[T] tokens of the batch, [t] tokens of one engine's share, [L] captured layers, [H] query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlattn.config import RunConfig
from rlattn.kernels import StatisticsOptions
from rlattn.rollout.cluster import ActorLost
from rlattn.rollout.fleet import Fleet, Member
from rlattn.signals import HeadGroups, HeadSums, groups_of, pool_heads
from rlattn.types import ExtraSignal, Rollouts, Signals, token_indices


def score_signals(
    fleet: Fleet,
    config: RunConfig,
    layers: list[int],
    rollouts: Rollouts,
    groups: HeadGroups | None,
    extra: Sequence[ExtraSignal],
) -> Signals:
    """Signals of a batch, each sequence measured by one engine; see `RolloutPool.score`.

    Spans are pooled over the engines before heads are grouped, as over the policy's ranks. An engine that is lost on
    the way is rebuilt, and everything measured again.
    """
    while True:
        members = fleet.whole()
        try:
            signals = _measure(fleet, members, config, layers, rollouts, groups, extra)
        except ActorLost:
            continue
        for member in members:
            member.losses = 0
        return signals


def _measure(
    fleet: Fleet,
    members: Sequence[Member],
    config: RunConfig,
    layers: list[int],
    rollouts: Rollouts,
    groups: HeadGroups | None,
    extra: Sequence[ExtraSignal],
) -> Signals:
    settings, timeout_s = config.signals, config.rollout.generate_timeout_s
    options = StatisticsOptions(settings.waad_window, settings.fai_low, settings.fai_high, settings.sink_tokens)
    receivers = settings.fai_low if settings.heads.select == "receiver" else None
    lengths = rollouts.lengths.tolist()
    sequences = rollouts.token_ids.split(lengths)
    work = list(zip(members, balanced(lengths, len(members)), strict=True))
    work = [(member, share) for member, share in work if share]
    calls = []
    for member, share in work:
        ids, starts = [sequences[b].tolist() for b in share], rollouts.prompt_lengths[share].tolist()
        ref = member.actor.measure.remote(ids, starts, layers, options, spans=groups is None, receivers=receivers)
        calls.append((member, ref))
    sums: list[HeadSums] = fleet.each("measuring attention", timeout_s, calls)
    means = pool_heads(sums)
    known = None if groups is None else torch.tensor(groups, dtype=torch.int8)  # [L, H]
    chosen = groups_of(means, settings.heads, known)
    calls = [(member, member.actor.reduce.remote(settings.heads, chosen, tuple(extra))) for member, _ in work]
    parts: list[dict[str, Tensor]] = fleet.each("reducing attention", timeout_s, calls)
    columns = {name: torch.zeros(len(rollouts.token_ids)) for name in ("waad", "fai", *extra)}  # [T] each
    for (_, share), part in zip(work, parts, strict=True):
        places = token_indices(rollouts.cu_seqlens, share)
        for name, values in part.items():  # [t] each
            columns[name][places] = values
    return Signals(
        waad=columns["waad"],
        fai=columns["fai"],
        layers=layers,
        span=means.span,
        entropy=means.entropy,
        sink_mass=means.sink_mass,
        groups=chosen,
        extra={name: columns[name] for name in extra},
    )


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Places in `lengths` dealt into parts of like sums: the longest first, each to the part with least."""
    bins: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        bins[least].append(place)
        loads[least] += lengths[place]
    return bins
