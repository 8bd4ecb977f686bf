"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.losses.inputs import same_shape


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, the greater of that and of the value held near its old one.

    max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2, as in OpenAI's PPO and TRL's.

    Args:
        values: [n] of the critic being updated; gradients flow here.
        old_values: [n] before the update.
        returns: [n], the targets.
        cliprange_value: c; None clips nothing.

    Returns:
        loss [n] fp32, and where the clipped error is the greater one, [n] bool.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    error = (values.float() - returns).square()
    if cliprange_value is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    held = torch.clamp(values.float(), old_values - cliprange_value, old_values + cliprange_value)
    clipped = (held - returns).square()
    return torch.maximum(error, clipped) / 2, clipped > error
