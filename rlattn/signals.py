"""Head groups, and the reduction of per-head attention statistics to WAAD and FAI per token.

[L] captured layers, [H] query heads, [t] tokens of a micro-batch, [b] its sequences, [T] tokens of the whole batch.

Each rank holds rows of its own sequences. Spans are pooled over all of them, heads are grouped once, and each rank then
averages its own rows; WAAD and FAI are linear in the maps, so a mean over heads is the value of the mean map. Where
groups are known beforehand, a micro-batch can be reduced on its own, before the rest of the batch is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlattn.config import HeadsConfig, SignalsConfig
from rlattn.credit.selection import select
from rlattn.types import ExtraSignal, Rollouts, Signals

if TYPE_CHECKING:
    from rlattn.kernels import AttentionStatistics, StatisticsOptions

AllReduce = Callable[[Tensor], object]

LOCAL, GLOBAL = -1, 1
FAI_TOP_SHARE = 0.4  # the paper's q, fixed so that the metric compares across runs


HeadGroups = Sequence[Sequence[int]]  # [L][H], as `Signals.groups`, between steps


@dataclass(frozen=True)
class HeadSums:
    """Per-head statistics of a micro-batch, summed over each sequence's response rows.

    Attributes:
        values: [1, 3 or 4, L, H, b] fp64: sink mass and, where they were measured, span (tokens), entropy (nats), and
            the kurtosis of FAI, which is a sequence's and counts once for each of its rows.
        rows: [b] fp64, response rows of each sequence.
    """

    values: Tensor
    rows: Tensor


@dataclass(frozen=True)
class HeadMeans:
    """Means of the same over the response rows of the whole batch: [L, H] fp32 on the CPU, equal on every rank."""

    sink_mass: Tensor
    span: Tensor | None = None
    entropy: Tensor | None = None
    kurtosis: Tensor | None = None


@dataclass(frozen=True)
class SignalRows:
    """One micro-batch's per-head statistics, all that grouping and reduction need.

    Attributes:
        waad: [L, H, t] fp32, 0 outside responses.
        fai: [L, H, t] fp32, 0 outside responses.
        lengths: tokens of each sequence.
        sums: of the other statistics.
        flow: [t] fp32, 0 outside responses; None where it was not wanted.
    """

    waad: Tensor
    fai: Tensor
    lengths: list[int]
    sums: HeadSums
    flow: Tensor | None = None

    @classmethod
    def collect(
        cls,
        statistics: Mapping[int, AttentionStatistics],
        layers: Sequence[int],
        cu_seqlens: Tensor,
        response_starts: Tensor,
        *,
        spans: bool = True,
        receivers: int | None = None,
        flow: Tensor | None = None,
    ) -> SignalRows:
        """From a micro-batch's statistics (layer -> each [H, t]), `cu_seqlens` [b+1] and `response_starts` [b].

        Without `spans`, span and entropy are left out even where they were measured (attention without a log-sum-exp
        to give visits every key anyway), so that what a run reports does not depend on its device. With `receivers`,
        H_lo of eq. 10, the kurtosis of FAI over each response's positions comes with them; the last H_lo, which no row
        looks back at, are left out. `flow` [t] is the flow of the same forward, prompts too.
        """
        chosen = [statistics[layer] for layer in layers]
        lengths = cu_seqlens.diff().tolist()

        kinds = [[s.sink_mass for s in chosen]]
        if spans:
            kinds.append([s.span for s in chosen if s.span is not None])
            kinds.append([s.entropy for s in chosen if s.entropy is not None])
        if {len(kind) for kind in kinds} != {len(chosen)}:
            raise ValueError("spans are wanted from a capture that did not measure them")
        each = torch.stack([torch.stack(kind) for kind in kinds])  # [1 or 3, L, H, t]
        # One sum a sequence, which never depends on its neighbours.
        values = torch.stack([part.sum(-1, dtype=torch.float64) for part in each.split(lengths, -1)], -1)
        fai = torch.stack([s.fai for s in chosen])  # [L, H, t]
        rows = (cu_seqlens[1:] - response_starts).to(values)
        if spans and receivers is not None:
            bounds = zip(response_starts.tolist(), (cu_seqlens[1:] - receivers).tolist(), strict=True)
            peaked = torch.stack([kurtosis(fai[..., start : max(start, end)]) for start, end in bounds], -1)
            values = torch.cat([values, (peaked * rows)[None]])
        if flow is not None:
            starts = torch.repeat_interleave(response_starts, cu_seqlens.diff())
            flow = flow * (torch.arange(len(starts)) >= starts).to(flow.device)
        return cls(torch.stack([s.waad for s in chosen]), fai, lengths, HeadSums(values, rows), flow)


@dataclass(frozen=True)
class ReducedSignals:
    """A rank's signals: `reduce_rows` of each micro-batch; `groups` [L, H] int8 as in `Signals`."""

    columns: list[dict[str, Tensor]]
    means: HeadMeans
    groups: Tensor


def statistics_options(signals: SignalsConfig) -> StatisticsOptions:
    """What the settings have measured."""
    from rlattn.kernels import StatisticsOptions

    return StatisticsOptions(signals.waad_window, signals.fai_low, signals.fai_high, signals.sink_tokens)


def receivers_of(signals: SignalsConfig) -> int | None:
    """`receivers` of `SignalRows.collect`: H_lo, where heads are chosen by kurtosis."""
    return signals.fai_low if signals.heads.select == "receiver" else None


def group_tensor(groups: HeadGroups | None) -> Tensor | None:
    """[L, H] int8."""
    return None if groups is None else torch.tensor(groups, dtype=torch.int8)


def reusable_groups(heads: HeadsConfig, step: int, previous: HeadGroups | None) -> HeadGroups | None:
    """The head groups that this step takes over from the step before; None means: measure them.

    Only scope `calibrated` reuses groups, on every step that is no multiple of `refresh_steps`. `previous` is None
    where no step has measured any.
    """
    return previous if heads.scope == "calibrated" and step % heads.refresh_steps else None


def trains_in_one_forward(signals: SignalsConfig, groups: HeadGroups | None) -> bool:
    """Whether a step with the head groups `groups` can do without a scoring forward.

    It cannot where the groups must be measured first: WAAD and FAI of the first micro-batch would need the last one's
    spans. Scope `sequence` needs no more than the sequence itself.
    """
    known = groups is not None or signals.heads.scope == "sequence" or signals.heads.select == "all"
    return signals.forward == "train" and known


def decodable_groups(signals: SignalsConfig, step: int, previous: HeadGroups | None) -> HeadGroups | None:
    """The head groups by which sampling measures attention in this step; None where it does not.

    `previous` as in `reusable_groups`.
    """
    if signals.forward != "decode":
        return None
    return previous if signals.heads.select == "all" else reusable_groups(signals.heads, step, previous)


def kurtosis(values: Tensor) -> Tensor:
    """Fourth central moment over the squared second of [..., n], fp64; 0 where nothing varies or n is 0."""
    values = values.double()
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return torch.where(variance > 0, centred.pow(4).mean(-1) / variance.square(), 0.0)


def head_groups(span: Tensor, fraction: float, peaked: Tensor | None = None) -> Tensor:
    """Group heads by span: the lowest `fraction` are local-focused, the highest global-focused [Li 2026, eq. 8].

    With `peaked`, the global ones are the highest of it among those that are not local. Ties go to the lower (layer,
    head), local first; no head is in both groups.

    Args:
        span: [..., L, H], mean attention distance in tokens [Li 2026, eq. 7].
        fraction: share of the L*H heads in each group, rounded down, at least one head.
        peaked: [..., L, H], the kurtosis of each head's FAI (receiver heads, arXiv 2506.19143).

    Returns:
        [..., L, H] int8, -1 local, +1 global, 0 neither.

    Raises:
        ValueError: fewer than two heads, a fraction outside (0, 0.5], or a span that is not finite.
    """
    flat = span.flatten(-2)  # [..., L*H]
    heads = flat.shape[-1]
    if heads < 2 or not 0 < fraction <= 0.5:
        raise ValueError(
            f"{heads} captured heads cannot form two groups of share {fraction}; need 2 heads, share <= 0.5"
        )
    if not flat.isfinite().all():
        raise ValueError("a head's span is not finite: the attention statistics are broken")
    count = max(1, floor(fraction * heads + 1e-9))
    groups = torch.zeros_like(flat, dtype=torch.int8)
    lowest = flat.argsort(dim=-1, stable=True)[..., :count]
    reach = flat if peaked is None else peaked.flatten(-2)
    rest = reach.scatter(-1, lowest, -torch.inf)
    highest = rest.argsort(dim=-1, descending=True, stable=True)[..., :count]
    groups.scatter_(-1, lowest, LOCAL).scatter_(-1, highest, GLOBAL)
    return groups.view(span.shape)


def group_mean(rows: Tensor, groups: Tensor, group: int) -> Tensor:
    """[t] fp32, the mean over one group's heads of per-head rows [L, H, t]; `groups` is [L, H] int8."""
    return rows[groups == group].mean(0)


def pool_heads(sums: Sequence[HeadSums], all_reduce: AllReduce | None = None) -> HeadMeans:
    """Means over the response rows of every rank's micro-batches; `sums` are this rank's, at least one.

    `all_reduce` adds a tensor over the ranks, in place; None on a single rank. Every rank must call this function.
    """
    totals = torch.stack([s.values.sum(-1) for s in sums]).sum(0)  # [1 or 3, L, H]
    count = torch.stack([s.rows.sum() for s in sums]).sum()
    pooled = torch.cat([totals.flatten(), count[None]])
    if all_reduce is not None:
        all_reduce(pooled)
    return HeadMeans(*(pooled[:-1] / pooled[-1].clamp(min=1)).view_as(totals).float().cpu())


def groups_of(means: HeadMeans, heads: HeadsConfig, known: Tensor | None = None) -> Tensor:
    """[L, H] int8, the batch's head groups: those `known`, else by its spans and kurtosis; none with `select: all`.

    Raises:
        ValueError: none are known and what would make them was not measured.
    """
    if known is not None:
        return known
    if heads.select == "all":
        return torch.zeros_like(means.sink_mass, dtype=torch.int8)
    return _grouped(means.span, means.kurtosis, heads)


def _grouped(span: Tensor | None, peaked: Tensor | None, heads: HeadsConfig) -> Tensor:
    if span is None:
        raise ValueError("head groups are neither given nor can they be made: spans were not measured")
    if heads.select == "receiver" and peaked is None:
        raise ValueError("signals.heads.select=receiver needs the kurtosis of FAI, which was not measured")
    return head_groups(span, heads.fraction, peaked if heads.select == "receiver" else None)


def _flow(rows: SignalRows) -> Tensor:
    if rows.flow is None:
        raise ValueError("the flow is wanted from a capture that did not trace it")
    return rows.flow


EXTRA: dict[ExtraSignal, Callable[[SignalRows], Tensor]] = {  # -> [t]
    "fai_all": lambda rows: rows.fai.mean((0, 1)),
    "flow": _flow,
}


def reduce_rows(
    rows: SignalRows, heads: HeadsConfig, groups: Tensor | None, extra: Collection[ExtraSignal] = ()
) -> dict[str, Tensor]:
    """`waad`, `fai` [Li 2026, eq. 9-10] and the `extra` signals of one micro-batch, [t] fp32 on the CPU each.

    `groups` is [L, H] int8; None under scope `sequence`, whose sequences are grouped by their own spans, and where
    `select` is `all`.

    Raises:
        ValueError: the groups, or the spans that scope `sequence` needs, are missing.
    """
    if heads.select == "all":

        def reduce(values: Tensor, group: int) -> Tensor:
            return values.mean((0, 1)).cpu()
    elif heads.scope == "sequence":
        if len(rows.sums.values) == 1:
            raise ValueError("signals.heads.scope=sequence needs spans, which were not measured")
        means = HeadMeans(*(rows.sums.values / rows.sums.rows.clamp(min=1)).float().movedim(-1, 1))  # [b, L, H] each
        own = _grouped(means.span, means.kurtosis, heads)

        def reduce(values: Tensor, group: int) -> Tensor:
            parts = zip(values.split(rows.lengths, -1), own, strict=True)
            return torch.cat([group_mean(part, g, group) for part, g in parts]).cpu()
    else:
        if groups is None:
            raise ValueError(f"signals.heads.scope={heads.scope} needs the batch's head groups")
        shared = groups.to(rows.waad.device)

        def reduce(values: Tensor, group: int) -> Tensor:
            return group_mean(values, shared, group).cpu()

    columns = {"waad": reduce(rows.waad, LOCAL), "fai": reduce(rows.fai, GLOBAL)}
    columns.update((name, EXTRA[name](rows).cpu()) for name in extra)
    return columns


def reduce_signals(
    rows: Sequence[SignalRows],
    heads: HeadsConfig,
    *,
    groups: Tensor | None = None,
    extra: Collection[ExtraSignal] = (),
    all_reduce: AllReduce | None = None,
) -> ReducedSignals:
    """Group the heads and reduce this rank's rows to WAAD and FAI per token [Li 2026, eq. 7-10].

    Args:
        rows: this rank's micro-batches, at least one.
        heads: `scope: batch` and `calibrated` group heads once, by spans (and kurtosis) pooled over the response rows
            of every rank; `sequence` groups them for each sequence by its own.
        groups: [L, H] int8, to use instead of grouping; the rows may then lack spans.
        extra: further signals to reduce to, see `Signals`.
        all_reduce: adds a tensor over the ranks, in place; None on a single rank. Every rank must call this function.

    Returns:
        this rank's signals; means and groups are the whole batch's, equal on every rank.
    """
    means = pool_heads([r.sums for r in rows], all_reduce)
    groups = groups_of(means, heads, groups)
    return ReducedSignals([reduce_rows(r, heads, groups, extra) for r in rows], means, groups)


def signal_metrics(signals: Signals, rollouts: Rollouts, previous_groups: HeadGroups | None = None) -> dict[str, float]:
    """What to log about a batch's signals.

    Args:
        signals: the batch's.
        rollouts: the batch.
        previous_groups: [L][H], the head groups measured before; None on the first step, which has no turnover.

    Returns:
        `signals/waad_mean` (tokens, over response tokens); `signals/fai_top_share`, how much of the batch's FAI lies in
        the top 40% tokens of each response; `signals/sink_mass/<layer>`, mean over heads; and, where this batch's spans
        were measured, `signals/attention_entropy/<layer>` (nats), mean over heads, and `signals/head_turnover`, share
        of grouped heads that were in another group or none before.
    """
    starts = rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths
    return packed_metrics(signals, starts, rollouts.cu_seqlens[1:], previous_groups)


def packed_metrics(
    signals: Signals, starts: Tensor, ends: Tensor, previous_groups: HeadGroups | None = None
) -> dict[str, float]:
    """`signal_metrics` of packed sequences whose responses are tokens starts[b] to ends[b]; [b] int64 each."""
    bounds = list(zip(starts.tolist(), ends.tolist(), strict=True))
    responses = [signals.fai[a:b] for a, b in bounds if a < b]
    top = sum(fai[select(fai, FAI_TOP_SHARE)].sum().item() for fai in responses)
    total = sum(fai.sum().item() for fai in responses)
    tokens = sum(len(fai) for fai in responses)
    metrics = {
        "signals/waad_mean": torch.cat([signals.waad[a:b] for a, b in bounds]).sum().item() / max(tokens, 1),
        "signals/fai_top_share": top / total if total else 0.0,
    }
    grouped = signals.groups != 0
    if previous_groups is not None and signals.span is not None and grouped.any():
        changed = signals.groups != torch.tensor(previous_groups)
        metrics["signals/head_turnover"] = changed[grouped].float().mean().item()
    for name, per_head in (("attention_entropy", signals.entropy), ("sink_mass", signals.sink_mass)):
        if per_head is not None:
            values = zip(signals.layers, per_head.mean(1).tolist(), strict=True)
            metrics |= {f"signals/{name}/{layer}": value for layer, value in values}
    return metrics
