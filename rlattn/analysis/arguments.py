"""The arguments of `rlattn analyze`; apart from the command, which takes a second to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlattn.checkpoint_choice import add_choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder or hub id, or the folder of a run (its newest weights, task and signals)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as signals.fai_high=100 peaks.prominence=1"
    )
    parser.add_argument("--task", metavar="T", help="whose test problems are answered (default: the run's own)")
    parser.add_argument("-n", type=int, metavar="N", help="responses, of the first N problems or lines (default 70)")
    parser.add_argument("--responses", type=Path, metavar="FILE", help="read responses from these JSON lines instead")
    parser.add_argument("--seed", type=int, help="of sampling and of every interval (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/analysis/MODEL-HASH)")
    add_choice(parser)
