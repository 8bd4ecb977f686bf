"""The arguments of `rlattn study`."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `rlattn study`."""
    command.add_argument("study", help="a YAML file, or the name of a shipped study such as `quickstart`")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as seeds=[0,1] output_dir=runs/mine")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check every run's config and print the grid")
    instead.add_argument("--report", action="store_true", help="table and curves of what is there; run nothing")
