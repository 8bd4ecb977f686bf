"""SAPO's aggregation is GRPO's (arXiv 2511.20347); its objective is in `rlattn.objectives.sapo`."""

from __future__ import annotations

from rlattn.losses.grpo import grpo

sapo = grpo
