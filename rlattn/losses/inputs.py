"""What the loss of a micro-batch is made from, and sums over its sequences. [n] response tokens of the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch; every tensor is [n], sequence after sequence, and n may be 0.

    Attributes:
        logps: fp32 under the policy being updated; gradients flow here.
        old_logps: fp32 under the policy before the update.
        advantages: fp32, credit included.
        weights: fp32, what a token's loss counts for in the optimizer step, see `rlattn.losses.token_weights`.
        sequences: int64, which sequence of the micro-batch a token is of, rising from 0.
        entropy: fp32, nats, with gradients; needed with `entropy_coef`.
        mean_weights: fp32, what a token counts for in a mean over the optimizer step's tokens; needed with the same.
        reference_logps: fp32 under the reference policy; needed with `beta`.
        sampled_logps: fp32, those that the engine drew the tokens with; needed with
            `vllm_importance_sampling_correction`.

    Raises:
        ValueError: shapes differ, which would broadcast in silence.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: Tensor
    entropy: Tensor | None = None
    mean_weights: Tensor | None = None
    reference_logps: Tensor | None = None
    sampled_logps: Tensor | None = None

    def __post_init__(self) -> None:
        same_shape(**{name: tensor for name, tensor in vars(self).items() if tensor is not None})

    @property
    def counted(self) -> Tensor:
        """[n] bool, the tokens that are in any mean: not those of masked truncated completions."""
        return self.weights != 0

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[n], every token's value being the sum over its sequence's counted tokens."""
        counted = values * self.counted
        size = int(self.sequences[-1]) + 1 if len(self.sequences) else 0
        sums = counted.new_zeros(size).index_add(0, self.sequences, counted)
        return sums[self.sequences]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[n], every token's value being the mean over its sequence's counted tokens."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values)).clamp(min=1)


class Clipped(NamedTuple):
    """Where the clip range stops the gradient, [n] bool each; TRL's `clip_ratio/low_mean` and `.../high_mean`."""

    low: Tensor
    high: Tensor


def same_shape(**tensors: Tensor) -> None:
    """Refuse tensors whose shapes differ, which would broadcast in silence.

    Raises:
        ValueError: names every shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, not {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
