"""VESPO's aggregation, in TRL, is DAPO's token mean; its objective is in `rlattn.objectives.vespo`."""

from __future__ import annotations

from rlattn.losses.dapo import dapo

vespo = dapo
