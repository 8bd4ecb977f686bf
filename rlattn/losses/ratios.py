"""Importance ratios of the policy being updated to the one before the update, by level."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlattn.losses.inputs import LossInputs


def token(inputs: LossInputs) -> Tensor:
    """[n], log of each token's own ratio (arXiv 1707.06347)."""
    return inputs.logps.float() - inputs.old_logps.float()


def sequence(inputs: LossInputs) -> Tensor:
    """[n], the mean log ratio of a token's sequence: log of GSPO's s_i (arXiv 2507.18071, eq. 7)."""
    return inputs.sequence_mean(token(inputs))


def sequence_token(inputs: LossInputs) -> Tensor:
    """[n], s_i in value and the token's own ratio in gradient (GSPO-token, arXiv 2507.18071, eq. 14).

    Equal to `sequence` in value and gradient where a sequence's tokens share one advantage; with credit they do not.
    """
    return sequence(inputs).detach() + inputs.logps.float() - inputs.logps.float().detach()


LOG_RATIOS: dict[str, Callable[[LossInputs], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence_token": sequence_token,
}
"""`algorithm.importance_sampling_level` to the log ratio [n], with gradients."""
