"""The arguments of `rlattn eval`; apart from the command, which takes a second to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlattn.checkpoint_choice import add_choice

USAGE = """rlattn eval MODEL --benchmarks NAME[,NAME...] [options] [key=value ...]
       rlattn eval RUN_DIR [options] [key=value ...]
       rlattn eval --score FILE.jsonl [--benchmarks NAME[,NAME...]] [--data DIR]
       rlattn eval compare A B"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.usage = USAGE
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="MODEL",
        help="a Hugging Face folder or hub id, or the folder of a run (its newest weights, on its own task unless "
        "--benchmarks says otherwise); or `compare` and two results folders",
    )
    parser.add_argument("--benchmarks", type=_names, default=[], metavar="A,B", help="such as aime24,math500,countdown")
    parser.add_argument("-k", type=int, metavar="K", help="completions a problem (default: the benchmark's own)")
    parser.add_argument("--temperature", type=float, help="of sampling (default: 0 for k 1, else 1.0)")
    parser.add_argument("--top-p", type=float, help="nucleus mass (default 1)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest completion (default: the context's rest)")
    parser.add_argument("--seed", type=int, help="of sampling (default 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each benchmark")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of BENCHMARK.jsonl (default: the hub)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/eval/MODEL-HASH)")
    parser.add_argument("--score", type=Path, metavar="FILE", help="judge these completions: id, completion, answer")
    parser.add_argument("--explain", action="store_true", help="print each verdict and its reason")
    add_choice(parser)
    parser.set_defaults(overrides=[])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
