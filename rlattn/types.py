"""The data that moves between the rooms.

Shape legend: [T] tokens of the packed batch, [B] sequences, [L] captured layers, [H] query heads. Batches are packed,
never padded: flat tensors plus `cu_seqlens`. Index t means token t everywhere: `logps[t]` is the log-probability with
which token t was drawn (from the logits at t-1), `entropy[t]` the entropy of that distribution, `waad[t]` the reach of
the attention row whose query is token t, `fai[t]` what later rows give to token t as a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlattn.problem import Problem

ExtraSignal = Literal["fai_all"]  # measured only for a credit strategy that asks, see `rlattn.credit.needs`
EXTRA_SIGNALS: tuple[ExtraSignal, ...] = get_args(ExtraSignal)


@dataclass(frozen=True)
class Rollouts:
    """A packed batch of prompts with their sampled completions.

    Attributes:
        token_ids: [T] int64, prompt then completion (with its end-of-sequence token, where it was sampled).
        cu_seqlens: [B+1] int64, sequence b is token_ids[cu_seqlens[b]:cu_seqlens[b+1]].
        prompt_lengths: [B] int64, tokens before the response.
        sampled_logps: [T] fp32, log-probs the engine drew the tokens with, at its temperature; 0 on prompts.
        group_ids: [B] int64, which prompt of the batch a sequence answers.
        truncated: [B] bool, stopped by `max_completion_length` rather than by its own end.
        policy_version: [B] int64, optimizer version of the weights that sampled it.
        rewards: [B] fp32, total reward; NaN until scored.
        texts: B completions as text.
        problems: B problems, one a sequence.
        reward_parts: name -> [B] fp32, the parts of the reward; empty until scored.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    sampled_logps: Tensor
    group_ids: Tensor
    truncated: Tensor
    policy_version: Tensor
    rewards: Tensor
    texts: list[str]
    problems: list[Problem]
    reward_parts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens per sequence."""
        return self.cu_seqlens.diff()

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, completion tokens per sequence."""
        return self.lengths - self.prompt_lengths

    @property
    def sequence_ids(self) -> Tensor:
        """[T] int64, which sequence a token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """[T] bool, True on completion tokens."""
        starts = (self.cu_seqlens[:-1] + self.prompt_lengths)[self.sequence_ids]
        return torch.arange(len(self.token_ids)) >= starts

    def replace(self, **changes: Any) -> Rollouts:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Signals:
    """What attention says about each token of a batch; values outside responses are 0.

    Attributes:
        waad: [T] fp32, windowed average attention distance over the local heads [Li 2026, eq. 9].
        fai: [T] fp32, future attention influence over the global heads [Li 2026, eq. 10].
        layers: the captured layers, L of them.
        span: [L, H] fp32, mean attention distance over the batch's response rows [Li 2026, eq. 7]; None where the
            groups are those of an earlier step (scope `calibrated`).
        entropy: [L, H] fp32, mean attention entropy in nats over the same rows; None where span is.
        sink_mass: [L, H] fp32, mean attention on the first token over the same rows.
        groups: [L, H] int8, -1 local, +1 global, 0 neither, or all 0 with `heads.select: all` (scopes `batch` and
            `calibrated`; with `sequence`, each sequence has its own and this is the pooled one, for display).
        extra: name -> [T] fp32, the extra signals that the credit strategy asked for. `fai_all`: FAI over every
            captured head, whatever its group.
    """

    waad: Tensor
    fai: Tensor
    layers: list[int]
    span: Tensor | None
    entropy: Tensor | None
    sink_mass: Tensor
    groups: Tensor
    extra: Mapping[ExtraSignal, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What one forward of the policy says about a batch, aligned with `Rollouts.token_ids`; 0 on prompts.

    Attributes:
        logps: [T] fp32, log-probs under the policy before the update, at the sampling temperature.
        entropy: [T] fp32, predictive entropy in nats at the same temperature.
        signals: attention signals of the same forward.
        reference_logps: [T] fp32 under the reference policy, or None where `algorithm.beta` is 0.
    """

    logps: Tensor
    entropy: Tensor
    signals: Signals
    reference_logps: Tensor | None = None
