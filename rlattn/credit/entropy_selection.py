"""Baseline: learn only from the tokens with the highest predictive entropy ("forking tokens", arXiv 2506.01939)."""

from __future__ import annotations

from torch import Tensor

from rlattn.config import CreditConfig
from rlattn.credit import ResponseSignals
from rlattn.credit.selection import select


def entropy_selection(response: ResponseSignals, config: CreditConfig) -> Tensor:
    """Gamma [R] fp32: 1 on TopQ(entropy, `selection_q`), 0 elsewhere.

    Selected within each response, as every strategy does; the source ranks the tokens of a mini-batch together. It
    weighs ceil(`selection_q` |R|) tokens instead of |R|: compare at equal total weight with `normalize`.
    """
    return select(response.entropy, config.selection_q, config.which).float()
