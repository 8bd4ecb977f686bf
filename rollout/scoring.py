"""Attention signals of a batch from the engines that sampled it.

[T] tokens of the batch, [t] tokens of one engine's share, [L] captured layers, [H] query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from rlattn.types import ExtraSignal, Rollouts, Signals


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
