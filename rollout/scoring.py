"""Attention signals of a batch from the engines that sampled it.

[T] tokens of the batch, [t] tokens of one engine's share, [L] captured layers, [H] query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from rlattn.types import Decoded, ExtraSignal, Rollouts, Signals, token_indices


def signals_of(
    rollouts: Rollouts,
    layers: list[int],
    groups: HeadGroups | None,
    extra: Sequence[ExtraSignal],
    prefill: Callable[[Rollouts, HeadGroups | None], Signals],
) -> Signals:
    """Signals of a batch: what sampling measured by these `groups`, and of the rest what a `prefill` shows.

    Sampling that measured by no groups at all (`signals.heads.select: all`) fits every step. The last token of a
    completion was sampled and not read where sampling measured it, so its WAAD and what its row would give to others
    are 0; a prefill has it.
    """
    wanted = group_tensor(groups)

    def fits(own: Decoded) -> bool:
        return not own.groups.any() or (wanted is not None and torch.equal(own.groups, wanted))

    decoded = [own if own is not None and fits(own) else None for own in rollouts.decoded or [None] * len(rollouts)]
    measured = [own for own in decoded if own is not None]
    missing = [b for b, own in enumerate(decoded) if own is None]
    if not measured:
        return prefill(rollouts, groups)
    columns = {name: torch.zeros(len(rollouts.token_ids)) for name in ("waad", "fai", *extra)}  # [T] each
    for start, own in zip((rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths).tolist(), decoded, strict=True):
        if own is not None:
            for name, column in columns.items():
                column[start : start + len(own.columns[name])] = own.columns[name]
    sinks = torch.stack([own.sink_mass for own in measured]).sum(0)  # [L, H]
    rows = sum(len(own.columns["waad"]) for own in measured)
    known = measured[0].groups
    if missing:
        rest = prefill(rollouts.take(missing), known.tolist())
        tokens = token_indices(rollouts.cu_seqlens, missing)
        columns["waad"][tokens], columns["fai"][tokens] = rest.waad, rest.fai
        for name in extra:
            columns[name][tokens] = rest.extra[name]
        more = int(rollouts.response_lengths[missing].sum())
        sinks += rest.sink_mass * more
        rows += more
    return Signals(
        waad=columns["waad"],
        fai=columns["fai"],
        layers=layers,
        span=None,
        entropy=None,
        sink_mass=sinks / max(1, rows),
        groups=known,
        extra={name: columns[name] for name in extra},
    )


def score_signals(
    fleet: Fleet,
    config: RunConfig,
    layers: list[int],
    extra: Sequence[ExtraSignal],
    rollouts: Rollouts,
    groups: HeadGroups | None,
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
