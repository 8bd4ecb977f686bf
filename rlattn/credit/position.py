"""Control: the same budget on fixed positions, whatever the tokens there say."""

from __future__ import annotations

import torch
from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals
from rlattn.credit.selection import amplify, budget


def position(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32: g on ceil(q|R|) tokens that `position` places by the length |R| alone, 1 elsewhere.

    `start` is the sharper control of attention received, which FAI's horizon keeps from a response's last tokens.
    `which` makes no difference.
    """
    length = len(response.fai)
    size = budget(config.top_q, length)
    place = torch.arange(size)
    if config.position == "even":
        place = place * length // size  # the first token of each of `size` equal stretches
    elif config.position == "end":
        place += length - size
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[place] = True
    return amplify(chosen, config.amplification)
