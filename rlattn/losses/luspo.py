"""LUSPO: a sequence counts for its length, so that GSPO favours no short ones (arXiv 2602.05261)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.losses import LossShape


def luspo(response_lengths: Tensor, shape: LossShape) -> Tensor:
    """Weight of a token of each sequence [B] fp32: 1 / B."""
    return torch.full_like(response_lengths, 1 / len(response_lengths), dtype=torch.float32)
