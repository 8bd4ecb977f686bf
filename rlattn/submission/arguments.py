"""The arguments of `rlattn submit|jobs|logs|stop`."""

from __future__ import annotations

import argparse
from pathlib import Path

SHIP_LIMIT_MIB = 64.0


def add_submit(command: argparse.ArgumentParser) -> None:
    """Arguments of `rlattn submit`, beside the config's and those that `rlattn train` takes as well."""
    add_address(command)
    command.add_argument("--dry-run", action="store_true", help="show what would be shipped and placed; submit nothing")
    command.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    command.add_argument("--name", help="beginning of the job's id (default: the config's name)")
    command.add_argument("--wheel", type=Path, metavar="FILE", help="ship this wheel of rlattn (default: this code)")
    command.add_argument("--python", default="python", metavar="PY", help="the cluster's interpreter (default: python)")
    command.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder that the cluster sees at the same path: nothing in it is shipped; may be given again",
    )
    command.add_argument(
        "--ship-limit",
        type=float,
        default=SHIP_LIMIT_MIB,
        metavar="MIB",
        help=f"most that local files may take (default: {SHIP_LIMIT_MIB:g})",
    )
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass on this environment variable (HF_TOKEN, WANDB_API_KEY); the cluster's administrators can read it",
    )
    command.add_argument(
        "--autoscaling", action="store_true", help="the cluster grows on demand: do not refuse what does not fit it now"
    )


def add_job(command: argparse.ArgumentParser) -> None:
    """A job's id, and where it is."""
    command.add_argument("job", metavar="ID", help="as `rlattn submit` and `rlattn jobs` show it")
    add_address(command)


def add_address(command: argparse.ArgumentParser) -> None:
    """Where the cluster's job server is."""
    command.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's job server, such as http://head:8265 (default: $RAY_API_SERVER_ADDRESS); "
        "its token is read from $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
    )
