"""The data that moves between the rooms.

Shape legend: [T] tokens of the packed batch, [B] sequences, [L] captured layers, [H] query heads. Batches are packed,
never padded: flat tensors plus `cu_seqlens`. Index t means token t everywhere: `logps[t]` is the log-probability with
which token t was drawn (from the logits at t-1), `entropy[t]` the entropy of that distribution, `waad[t]` the reach of
the attention row whose query is token t, `fai[t]` what later rows give to token t as a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlattn.problem import Problem

ExtraSignal = Literal["fai_all", "flow"]  # measured only for a credit strategy that asks, see `rlattn.credit.needs`
EXTRA_SIGNALS: tuple[ExtraSignal, ...] = get_args(ExtraSignal)


@dataclass(frozen=True)
class Decoded:
    """One completion's attention signals, measured while it was sampled (`signals.forward: decode`).

    Attributes:
        columns: `waad`, `fai` and extra signals -> [n] fp32, of its first n tokens. Where n is its length less one,
            its last token was sampled and never read.
        sink_mass: [L, H] fp32, summed over these tokens' rows.
        groups: [L, H] int8, the head groups that the columns are reduced by.
    """

    columns: dict[str, Tensor]
    sink_mass: Tensor
    groups: Tensor


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
        answer_spans: [B, 2] int64, tokens of a sequence before its answer's first token and before the one after its
            last, twice its length where no answer was found; None until they are looked for, see `rlattn.answers`.
        decoded: B, what sampling measured of each completion, or None where it did not; None where it never does.
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
    answer_spans: Tensor | None = None
    decoded: list[Decoded | None] | None = None

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

    def take(self, sequences: Sequence[int]) -> Rollouts:
        """The batch of these sequences alone, in this order."""
        chosen = list(sequences)
        lengths = self.lengths[chosen]
        tokens = token_indices(self.cu_seqlens, chosen)
        packed = {"token_ids": self.token_ids[tokens], "sampled_logps": self.sampled_logps[tokens]}
        names = ("prompt_lengths", "group_ids", "truncated", "policy_version", "rewards")
        return replace(
            self,
            **packed,
            **{name: getattr(self, name)[chosen] for name in names},
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            texts=[self.texts[b] for b in chosen],
            problems=[self.problems[b] for b in chosen],
            reward_parts={name: part[chosen] for name, part in self.reward_parts.items()},
            answer_spans=None if self.answer_spans is None else self.answer_spans[chosen],
            decoded=None if self.decoded is None else [self.decoded[b] for b in chosen],
        )

    @staticmethod
    def cat(batches: Sequence[Rollouts]) -> Rollouts:
        """Batches one after the other, their groups numbered on; a reward part that one lacks is 0 there."""
        lengths = torch.cat([batch.lengths for batch in batches])
        groups = [0, *accumulate(int(batch.group_ids.max()) + 1 for batch in batches)]
        parts = dict.fromkeys(name for batch in batches for name in batch.reward_parts)
        spans = [batch.answer_spans for batch in batches]
        decoded = [batch.decoded for batch in batches if batch.decoded is not None]
        names = ("token_ids", "sampled_logps", "prompt_lengths", "truncated", "policy_version", "rewards")
        joined: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        return Rollouts(
            **joined,
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            group_ids=torch.cat([batch.group_ids + first for batch, first in zip(batches, groups, strict=False)]),
            texts=[text for batch in batches for text in batch.texts],
            problems=[problem for batch in batches for problem in batch.problems],
            reward_parts={
                name: torch.cat([batch.reward_parts.get(name, torch.zeros(len(batch))) for batch in batches])
                for name in parts
            },
            answer_spans=None if any(own is None for own in spans) else torch.cat([s for s in spans if s is not None]),
            decoded=[one for own in decoded for one in own] if len(decoded) == len(batches) else None,
        )


def token_indices(cu_seqlens: Tensor, sequences: Sequence[int]) -> Tensor:
    """[t] int64, where the tokens of the chosen sequences lie in a packed batch, sequence after sequence."""
    bounds = cu_seqlens.tolist()
    return torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in sequences])


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
            captured head, whatever its group. `flow`: the share of what flows from the prompt to the answer, over the
            mean map of every captured head, that passes the token (see `rlattn.kernels.flow`).
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
