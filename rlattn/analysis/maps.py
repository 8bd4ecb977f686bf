"""Ā_loc and Ā_glob as whole maps, for display alone: one short sequence at a time [Li 2026, eq. 8].

[N] tokens of the sequence, [l] layers, [H] heads, [D] channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlattn.analysis.measure import Array, hidden_states, pack_places
from rlattn.analysis.responses import Response
from rlattn.kernels import Capture, StatisticsOptions, register
from rlattn.kernels.ragged import Offsets
from rlattn.signals import GLOBAL, LOCAL


class MapCapture(Capture):
    """Sums the maps of each head group as the layers go by; no map of a single head outlives its layer."""

    def __init__(self, layers: list[int], groups: Tensor, start: int) -> None:
        super().__init__(layers, StatisticsOptions(), [start])
        self.groups = dict(zip(layers, groups, strict=True))  # layer -> [H]
        self.ungrouped = not groups.any()  # `heads.select: all`: both means are over every head
        self.sums: dict[int, Tensor | None] = {LOCAL: None, GLOBAL: None}

    def takes_lse(self, layer: int) -> bool:
        """Never."""
        return False

    def record(self, layer: int, q: Tensor, k: Tensor, cu_seqlens: Offsets, **variant: Any) -> None:
        """Add a layer's maps, from q [N, H, D] and k [N, Hkv, D]."""
        if layer not in self.groups:
            return
        n, window = len(q), variant.get("sliding_window")
        t = torch.arange(n, device=q.device)
        distance = t[:, None] - t
        visible = (distance >= 0) & (distance < (window or n))
        for group in (LOCAL, GLOBAL):
            for head in ((self.groups[layer] == group) | self.ungrouped).nonzero().squeeze(1).tolist():
                key = k[:, head * k.shape[1] // q.shape[1]]
                logits = (q[:, head].float() @ key.float().T * variant["scale"]).masked_fill(~visible, -torch.inf)
                own, before = logits.softmax(-1), self.sums[group]
                self.sums[group] = own if before is None else before + own


def mean_maps(
    model: PreTrainedModel, response: Response, layers: list[int], groups: np.ndarray, longest: int
) -> tuple[Array, Array]:
    """Ā_loc and Ā_glob [N, N] fp32 of the first `longest` tokens of prompt and response; `groups` is [l, H]."""
    model.set_attn_implementation(register())
    ids = response.ids[:longest]
    start = min(len(response.prompt_ids), len(ids))
    capture = MapCapture(layers, torch.from_numpy(groups), start)
    hidden_states(model, pack_places([Response("", "", ids[:start], ids[start:])], [0]), capture)
    found = []
    for group in (LOCAL, GLOBAL):
        total = capture.sums[group]
        assert total is not None  # no group is empty
        found.append((total / int(total[0, 0])).cpu().numpy())  # the first row of each head's map is a single 1
    return found[0], found[1]
