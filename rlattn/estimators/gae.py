"""Generalised advantage estimation over the response tokens of a packed batch (arXiv 1506.02438).

[T] tokens of the packed batch, [B] sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlattn.losses.inputs import same_shape
from rlattn.types import Rollouts


def gae(rollouts: Rollouts, rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum over l >= 0 of (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t (eq. 16).

    A response ends its episode: the value after its last token is 0, truncated or not.

    Args:
        rollouts: where the responses lie.
        rewards: [T] fp32, of drawing each token.
        values: [T] fp32, values[t] is V of the state in which token t is drawn.
        gamma: discount of a step.
        lam: weight of longer looks ahead; 1 is the plain return minus the value.

    Returns:
        advantages [T] and returns (advantages + values) [T], fp32, 0 outside responses.

    Raises:
        ValueError: shapes differ.
    """
    from scipy.signal import lfilter  # half a second, which runs without a critic need not wait for

    same_shape(token_ids=rollouts.token_ids, rewards=rewards, values=values)
    advantages = np.zeros(len(values))
    starts = (rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths).tolist()
    r, v = rewards.double().numpy(), values.double().numpy()
    for start, end in zip(starts, rollouts.cu_seqlens[1:].tolist(), strict=True):
        if start < end:
            delta = r[start:end] + gamma * np.append(v[start + 1 : end], 0.0) - v[start:end]
            advantages[start:end] = lfilter([1.0], [1.0, -gamma * lam], delta[::-1])[::-1]
    own = torch.from_numpy(advantages)
    returns = (own + values.double()) * rollouts.response_mask
    return own.float(), returns.float()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """[T], mean 0 and standard deviation 1 over the tokens of `mask`, 0 elsewhere (unbiased; guard 1e-8)."""
    chosen = values[mask].double()
    std = chosen.std() if len(chosen) > 1 else torch.zeros((), dtype=torch.float64)
    whole = torch.zeros_like(values)
    whole[mask] = ((chosen - chosen.mean()) / (std + 1e-8)).float()
    return whole
