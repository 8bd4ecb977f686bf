"""CISPO's aggregation is DAPO's token mean (arXiv 2506.13585, eq. 4); its objective is in `rlattn.objectives.cispo`."""

from __future__ import annotations

from rlattn.losses.dapo import dapo

cispo = dapo
