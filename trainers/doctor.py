"""`rlattn doctor`: this machine's findings, and with an address those about a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import ray

from rlattn.config import ConfigError
from rlattn.console import Console
from rlattn.doctor import CHECKS, Finding, examine
from rlattn.rollout.fit import amounts
from rlattn.trainers.jobs import JobServer


def run(args: argparse.Namespace) -> int:
    """Show every finding with its advice; 1 where something stops a run."""
    checks = list(CHECKS)
    if args.address:
        checks.append(partial(cluster, args.address))
    failed = 0
    with Console() as console:
        for finding in examine(checks):
            failed += finding.level == "fail"
            console.note(f"{finding.level.upper() if finding.level == 'fail' else finding.level:<4}  {finding.text}")
            if finding.advice:
                console.note(f"      -> {finding.advice}")
    return int(failed > 0)


def cluster(address: str) -> Iterator[Finding]:
    """A Ray cluster's job server: whether it is there and lets us in, its version, its nodes."""
    try:
        server = JobServer(address, "--address")
    except ConfigError as error:
        yield Finding("fail", str(error), "is the head running, and its port 8265 reachable from here?")
        return
    theirs = server.ask(server.client.get_version)
    text = f"job server at {address}: Ray {theirs}"
    if theirs != ray.__version__:
        yield Finding("warn", f"{text}, here {ray.__version__}", "jobs run on theirs; use one version to be sure")
    else:
        yield Finding("ok", text)
    nodes = server.nodes()
    for node in nodes:
        labels = {key: value for key, value in node.labels.items() if not key.startswith("ray.io/node-")}
        yield Finding("ok", f"node {node.name}: {amounts(node.resources)}{f', labels {labels}' if labels else ''}")
    if not any(node.resources.get("GPU") for node in nodes):
        yield Finding("warn", "no node has a GPU", "runs need policy.gpus_per_rank=0")
