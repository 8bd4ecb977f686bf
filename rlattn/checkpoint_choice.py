"""Which checkpoint of a run a command takes; apart from the checkpoints, which take seconds to import."""

from __future__ import annotations

import argparse


def add_choice(parser: argparse.ArgumentParser) -> None:
    """`--step STEP` or `--best`; neither is the newest."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=step_number, metavar="STEP", help="the run's checkpoint step-STEP, not its newest"
    )
    which.add_argument("--best", action="store_true", help="the run's best checkpoint by trainer.best_metric")


def step_number(text: str) -> int:
    """N of `N` or of `step-N`."""
    return int(text.removeprefix("step-"))
