"""Attention signals of a batch from the engines that sampled it.

[T] tokens of the batch, [t] tokens of one engine's share, [L] captured layers, [H] query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlattn.config import RunConfig
from rlattn.packing import plan, restore
from rlattn.rollout.fleet import Fleet
from rlattn.signals import (
    HeadGroups,
    HeadSums,
    group_tensor,
    groups_of,
    pool_heads,
    receivers_of,
    statistics_options,
)
from rlattn.types import ExtraSignal, Rollouts, Signals, token_indices


def signals_of(
    fleet: Fleet,
    config: RunConfig,
    layers: list[int],
    rollouts: Rollouts,
    groups: HeadGroups | None,
    extra: Sequence[ExtraSignal],
) -> Signals:
    """Signals of a batch: what sampling measured by these `groups`, and of the rest what a prefill shows.

    The last token of a completion was sampled and not read where sampling measured it, so its WAAD and what its row
    would give to others are 0; a prefill has it.

    Raises:
        ActorLost: as `score_signals`.
    """
    known = group_tensor(groups)
    decoded = rollouts.decoded or [None] * len(rollouts)
    if config.signals.heads.select == "all":
        known = next((torch.zeros_like(own.groups) for own in decoded if own), known)
    fits = [own is not None and known is not None and torch.equal(own.groups, known) for own in decoded]
    missing = [b for b, fit in enumerate(fits) if not fit]
    if len(missing) == len(rollouts):
        return score_signals(fleet, config, layers, rollouts, groups, extra)
    columns = {name: torch.zeros(len(rollouts.token_ids)) for name in ("waad", "fai", *extra)}  # [T] each
    starts = (rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths).tolist()
    sinks, rows = [], 0
    for start, own, fit in zip(starts, decoded, fits, strict=True):
        if own is not None and fit:
            for name, column in columns.items():
                column[start : start + len(own.columns[name])] = own.columns[name]
            sinks.append(own.sink_mass)
            rows += len(own.columns["waad"])
    if missing:
        rest = score_signals(fleet, config, layers, rollouts.take(missing), groups, extra)
        tokens = token_indices(rollouts.cu_seqlens, missing)
        columns["waad"][tokens], columns["fai"][tokens] = rest.waad, rest.fai
        for name in extra:
            columns[name][tokens] = rest.extra[name]
        more = int(rollouts.response_lengths[missing].sum())
        sinks.append(rest.sink_mass * more)
        rows += more
    assert known is not None
    return Signals(
        waad=columns["waad"],
        fai=columns["fai"],
        layers=layers,
        span=None,
        entropy=None,
        sink_mass=torch.stack(sinks).sum(0) / max(1, rows),
        groups=known,
        extra={name: columns[name] for name in extra},
    )


def score_signals(
    fleet: Fleet,
    config: RunConfig,
    layers: list[int],
    rollouts: Rollouts,
    groups: HeadGroups | None,
    extra: Sequence[ExtraSignal],
) -> Signals:
    """Signals of a batch, each sequence measured by one engine; see `RolloutPool.score`.

    Spans are pooled over the engines before heads are grouped, as over the policy's ranks.

    Raises:
        ActorLost: an engine was lost; those that are left know nothing of the batch.
    """
    heads, timeout_s = config.signals.heads, config.rollout.generate_timeout_s
    options = statistics_options(config.signals)
    wanted = {"spans": groups is None, "receivers": receivers_of(config.signals)}
    lengths = rollouts.lengths.tolist()
    sequences = rollouts.token_ids.split(lengths)
    layout = plan(lengths, min(len(fleet.members), len(lengths)), sum(lengths))
    work = [(member, share) for member, (share,) in zip(fleet.members, layout, strict=False)]
    calls = []
    for member, share in work:
        ids, starts = [sequences[b].tolist() for b in share], rollouts.prompt_lengths[share].tolist()
        ref = member.actor.measure.remote(ids, starts, layers, options, **wanted)
        calls.append((member, ref))
    sums: list[HeadSums] = fleet.each("measuring attention", timeout_s, calls)
    means = pool_heads(sums)
    chosen = groups_of(means, heads, group_tensor(groups))
    calls = [(member, member.actor.reduce.remote(heads, chosen, tuple(extra))) for member, _ in work]
    parts: list[dict[str, Tensor]] = fleet.each("reducing attention", timeout_s, calls)
    columns = {
        name: restore(rollouts.cu_seqlens, layout, [[part[name]] for part in parts]) for name in ("waad", "fai", *extra)
    }  # [T] each
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
