"""Objectives: what a token's loss is, given the importance ratio; one short file each.

A `loss_type` names one here, or means the clipped surrogate. How token losses add up is `rlattn.losses`' business.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlattn.config import AlgorithmConfig
from rlattn.losses.inputs import Clipped, LossInputs
from rlattn.objectives.cispo import cispo
from rlattn.objectives.clip import clip
from rlattn.objectives.sapo import sapo
from rlattn.objectives.vespo import vespo

Objective = Callable[[LossInputs, Tensor, AlgorithmConfig], tuple[Tensor, Clipped]]
"""(inputs, log of the importance ratio [n] with gradients, config) -> (token loss [n], where it is clipped)."""

OBJECTIVES: dict[str, Objective] = {"cispo": cispo, "sapo": sapo, "vespo": vespo}
"""`loss_type` to its objective, where that is not `clip`."""

__all__ = ["OBJECTIVES", "Objective", "cispo", "clip", "sapo", "vespo"]
