"""Attention signals and credit from forwards that somebody else's trainer runs on padded batches.

[B, S] a padded batch, [t] the real tokens of one forward, packed, [b] its sequences, [L] captured layers, [H] heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlattn import credit
from rlattn.config import CreditConfig, SignalsConfig
from rlattn.credit import PackedResponses
from rlattn.kernels import Capture, FlowMap, FlowOptions, PaddedCapture, Padding
from rlattn.signals import (
    AllReduce,
    HeadGroups,
    SignalRows,
    group_tensor,
    packed_metrics,
    receivers_of,
    reduce_signals,
    statistics_options,
)
from rlattn.types import ExtraSignal, Signals


@dataclass(frozen=True)
class Heard:
    """What one forward said: `columns` are `logps` and `entropy` [t] fp32 on the CPU, 0 on prompts."""

    padding: Padding
    columns: dict[str, Tensor]
    rows: SignalRows


@dataclass(frozen=True)
class Paid:
    """Gamma [B, S] fp32 on the CPU, 1 outside responses; this rank's metrics; the head groups [L][H] that gave it."""

    gamma: Tensor
    metrics: dict[str, float]
    groups: HeadGroups


class Listener:
    """Runs a model's forwards for a trainer, keeps what their attention says, and turns it into credit.

    Args:
        signals: what is measured.
        layers: the captured layers.
        extra: signals that the credit strategy needs beside WAAD and FAI.
        groups: head groups to use; None measures them.
    """

    def __init__(
        self, signals: SignalsConfig, layers: Sequence[int], extra: tuple[ExtraSignal, ...], groups: HeadGroups | None
    ) -> None:
        self.signals, self.layers, self.extra, self.groups = signals, list(layers), extra, groups
        self.heard: list[Heard] = []

    def to(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """`model` to be called in its place: with `attention_mask` [b, S], `labels` [b, S] (-100 outside responses) and
        whatever else, for outputs whose `log_probs` and `entropy` [b, S-1] are those of labels[:, 1:].

        Raises (when called):
            ValueError: a batch that `Padding` cannot describe, an attention variant that is not supported, or a model
                that does not hand `capture=` down to its attention.
        """

        def forward(**inputs: Any) -> Any:
            padding = Padding.of(inputs["attention_mask"], inputs["labels"] != -100)
            flow = self._flow_map(padding) if "flow" in self.extra else None
            spans = self.groups is None
            options = statistics_options(self.signals)
            capture = Capture(self.layers, options, padding.response_starts, spans=spans, flow=flow)
            outputs = model(**inputs, capture=PaddedCapture(capture, padding))
            if missing := sorted(set(self.layers) - set(capture.statistics)):
                raise ValueError(
                    f"layers {missing} of {type(model).__name__} gave no attention: it does not hand `capture` down to "
                    "transformers' attention interface; models that do (Qwen, Llama, ...) are accepted"
                )
            per_token = {"logps": outputs.log_probs, "entropy": outputs.entropy}
            columns = {name: padding.pack(pad(x.detach().float(), (1, 0))).cpu() for name, x in per_token.items()}
            rows = SignalRows.collect(
                capture.statistics,
                self.layers,
                padding.cu_seqlens,
                padding.response_starts,
                spans=spans,
                receivers=receivers_of(self.signals),
                flow=None if flow is None else flow.flow,
            )
            self.heard.append(Heard(padding, columns, rows))
            return outputs

        return forward

    def pay(
        self,
        advantages: Tensor,
        config: CreditConfig,
        *,
        seed: int,
        step: int,
        first: int = 0,
        previous: HeadGroups | None = None,
        all_reduce: AllReduce | None = None,
    ) -> Paid:
        """Credit of all that was heard.

        Args:
            advantages: [B] of this rank's sequences, in the order of the forwards.
            config: strategy and options.
            seed: of the run, as in `rlattn.credit.assign`.
            step: of the run; what is random differs from step to step.
            first: position of this rank's first sequence in the whole batch, which seeds their randomness.
            previous: groups measured before, for the metric of their turnover.
            all_reduce: adds a tensor over the ranks, in place; None on a single rank. Every rank must call this method.

        Raises:
            CreditError: the strategy's gamma cannot multiply advantages.
            ValueError: nothing, or not every sequence, was heard.
        """
        heard, sequences = self.heard, sum(h.padding.shape[0] for h in self.heard)
        if sequences != len(advantages):
            raise ValueError(f"the forwards held {sequences} sequences; credit is wanted for {len(advantages)}")
        groups = group_tensor(self.groups)
        reduced = reduce_signals(
            [h.rows for h in heard], self.signals.heads, groups=groups, extra=self.extra, all_reduce=all_reduce
        )
        columns = [h.columns | part for h, part in zip(heard, reduced.columns, strict=True)]
        whole = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}  # [T] each
        lengths = torch.cat([h.padding.cu_seqlens.diff() for h in heard])
        ends = lengths.cumsum(0)
        starts = ends - torch.cat([h.padding.cu_seqlens[1:] - h.padding.response_starts for h in heard])
        responses = PackedResponses(starts, ends, range(first, first + sequences), advantages.float().cpu())
        gamma, amplified = credit.assign_packed(whole, responses, config, seed=seed, step=step)
        mask = torch.zeros(len(gamma), dtype=torch.bool)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            mask[start:end] = True
        means = reduced.means
        said = Signals(
            whole["waad"],
            whole["fai"],
            self.layers,
            means.span,
            means.entropy,
            means.sink_mass,
            reduced.groups,
            {name: whole[name] for name in self.extra},
        )
        metrics = credit.spending(gamma, mask, amplified) | packed_metrics(said, starts, ends, previous)
        parts = gamma.split([len(h.columns["logps"]) for h in heard])
        padded = [h.padding.unpack(part, fill=1.0) for h, part in zip(heard, parts, strict=True)]
        return Paid(torch.cat(padded), metrics, reduced.groups.tolist())

    def _flow_map(self, padding: Padding) -> FlowMap:
        """The last tokens of a response stand for its answer, which a foreign trainer does not know."""
        flow = self.signals.flow
        bounds = zip(padding.response_starts.tolist(), padding.cu_seqlens[1:].tolist(), strict=True)
        answers = [(max(start, end - flow.fallback_tokens), end) for start, end in bounds]
        options = FlowOptions(flow.threshold, flow.storage)
        return FlowMap(padding.cu_seqlens, padding.response_starts, answers, len(self.layers), options)
