"""How token losses add up to the loss of an optimizer step.

That loss is sum over t of weight_t * token_loss_t over a whole mini-batch. The weights are fixed before the mini-batch
is cut into micro-batches and ranks, so packing, micro-batching and sharding cannot change it. One short file a
`loss_type` gives the weights; third parties add one under the entry point group `rlattn.losses`.

What a token loss is: `rlattn.objectives`, `rlattn.losses.token`.

[T] tokens of the packed batch, [B] sequences of the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlattn import registry
from rlattn.config import RunConfig
from rlattn.types import Rollouts


@dataclass(frozen=True)
class LossShape:
    """What an aggregation may need beside the lengths of its own mini-batch.

    Attributes:
        max_completion_length: the limit on completions, tokens.
        batch_tokens: response tokens that count in the whole batch of rollouts.
        mini_batches: optimizer steps that the batch of rollouts is cut into.
    """

    max_completion_length: int
    batch_tokens: int
    mini_batches: int


Aggregation = Callable[[Tensor, LossShape], Tensor]  # (response_lengths [B] int64, shape) -> weight of a token [B] fp32


def token_weights(rollouts: Rollouts, chosen: Sequence[int], config: RunConfig) -> Tensor:
    """What each token's loss counts for in the optimizer step on the mini-batch `chosen`.

    With `mask_truncated_completions` a truncated completion has length 0: as in TRL its tokens weigh nothing and are
    left out of every count of tokens, while it still counts as a sequence.

    Args:
        rollouts: the whole batch.
        chosen: indices of the mini-batch's sequences.
        config: the run's.

    Returns:
        [T] fp32, 0 outside the responses of `chosen`.
    """
    algorithm = config.algorithm
    counts = ~rollouts.truncated if algorithm.mask_truncated_completions else torch.ones_like(rollouts.truncated)  # [B]
    lengths = rollouts.response_lengths * counts
    shape = LossShape(config.rollout.max_completion_length, int(lengths.sum()), algorithm.steps_per_generation)
    aggregate: Aggregation = registry.LOSSES.load(algorithm.loss_type)
    weights = torch.zeros(len(lengths), dtype=torch.float32)
    weights[list(chosen)] = aggregate(lengths[list(chosen)], shape)
    return (weights * counts)[rollouts.sequence_ids] * rollouts.response_mask


def mean_weights(rollouts: Rollouts, chosen: Sequence[int], config: RunConfig) -> Tensor:
    """What each token counts for in a mean over the counted tokens of the mini-batch `chosen`, [T] fp32."""
    counts = (token_weights(rollouts, chosen, config) != 0).float()
    return counts / counts.sum().clamp(min=1)
