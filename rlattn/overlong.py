"""DAPO's soft penalty on completions that come near the limit (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(response_lengths: Tensor, max_completion_length: int, buffer_tokens: int) -> Tensor:
    """0 up to `max_completion_length - buffer_tokens`, from there falling in a straight line to -1 at the limit.

    Args:
        response_lengths: [B] int64, tokens.
        max_completion_length: the limit, tokens.
        buffer_tokens: length of the slope, at least 1.

    Returns:
        [B] fp32.
    """
    return ((max_completion_length - buffer_tokens - response_lengths) / buffer_tokens).clamp(-1, 0).float()
