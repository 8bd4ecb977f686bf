"""What a batch of rollouts looks like: metrics under the field's names (TRL's), and completions for reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlattn.tracking import CompletionRecord
from rlattn.types import Rollouts, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """`rewards/<part>/mean`, what the completions look like (lengths in tokens), and `rollout/decoded_share`.

    This is the share of them whose attention sampling measured, where it is to.
    """
    lengths = rollouts.response_lengths.float()
    metrics = {f"rewards/{name}/mean": part.mean().item() for name, part in rollouts.reward_parts.items()}
    if rollouts.decoded is not None:
        metrics["rollout/decoded_share"] = sum(own is not None for own in rollouts.decoded) / len(rollouts)
    return metrics | {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": rollouts.truncated.float().mean().item(),
    }


def sampling_metrics(rollouts: Rollouts, scores: Scores) -> dict[str, float]:
    """How far the trainer's log-probs are from those the engine sampled with, over response tokens (nats)."""
    mask = rollouts.response_mask
    difference: Tensor = scores.logps[mask] - rollouts.sampled_logps[mask]
    return {
        "sampling/sampling_logp_difference/mean": difference.abs().mean().item(),
        "sampling/sampling_logp_difference/max": difference.abs().max().item(),
        "sampling/importance_sampling_ratio/mean": torch.exp(difference).mean().item(),
        "entropy": scores.entropy[mask].mean().item(),
    }


def completion_records(
    rollouts: Rollouts, scores: Scores, gamma: Tensor, advantage: Tensor, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[CompletionRecord]:
    """The batch's first `count` completions with their token values; `gamma` is [T], `advantage` [B]."""
    records = []
    for b in range(min(count, len(rollouts))):
        end = int(rollouts.cu_seqlens[b + 1])
        response = slice(end - int(rollouts.response_lengths[b]), end)
        records.append(
            CompletionRecord(
                prompt=rollouts.problems[b].prompt,
                problem_id=rollouts.problems[b].id,
                reward=float(rollouts.rewards[b]),
                advantage=float(advantage[b]),
                truncated=bool(rollouts.truncated[b]),
                tokens=[str(tokenizer.decode([token])) for token in rollouts.token_ids[response].tolist()],
                waad=scores.signals.waad[response].tolist(),
                fai=scores.signals.fai[response].tolist(),
                gamma=gamma[response].tolist(),
                entropy=scores.entropy[response].tolist(),
                policy_version=int(rollouts.policy_version[b]),
            )
        )
    return records
