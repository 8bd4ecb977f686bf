"""`rlattn submit`, `jobs`, `logs` and `stop`: runs as jobs of a Ray cluster, over its job server's HTTP interface."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import yaml
from aiohttp import ClientError
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobDetails, JobStatus

from rlattn import __version__
from rlattn.config import ConfigError
from rlattn.console import Console, seconds
from rlattn.rollout.engine_args import check_engine_args
from rlattn.rollout.fit import describe_fit, fit
from rlattn.rollout.placement import Plan, describe, plan
from rlattn.stopping import EXIT_CODE
from rlattn.submission.shipping import CONFIG, MIB, Shipment, prepare
from rlattn.submission.wheel import build_wheel, unpack
from rlattn.trainers.jobs import ADDRESS_VARIABLE, JobServer, JobServerError

STOP_WAIT_S = 3600  # that a job has to end its step and save, once it was asked to stop
SILENCE_S = 20.0  # of a log after which the job itself is asked whether it still runs
AGAIN_S = 1.0  # between two tries to read a log
LOST_S = 60.0  # without a connection, after which following ends
CONFIG_OF, OUTPUT = "rlattn_config", "rlattn_output_dir"
"""Metadata keys of a job."""
NOISE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+(INFO|WARNING) \w+\.py:\d+ -- |(\x1b\[\d+m)?\(raylet\)"
    r"|\s{4,}\[(\d{4}-\d\d-\d\d |state-dump\])|\s+\(\d\) raylet "
)
"""Beginnings of what Ray itself says in a driver's log: of what dies, rlattn says what it means for the run."""


def submit(args: argparse.Namespace) -> int:
    """Ship a config with this code and submit it; unless told otherwise follow it, and return its exit code.

    Raises:
        ConfigError: the config, a file, the address or the cluster's size; nothing was submitted.
    """
    shipment = prepare(args.config, args.overrides, args.shared, args.ship_limit)
    check_engine_args(shipment.config)
    missing = [name for name in args.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: not set here; export it, or leave it out")
    layout = plan(shipment.config)
    on_paper = args.dry_run and not (args.address or os.environ.get(ADDRESS_VARIABLE))
    server = None if on_paper else _server(args)
    places = _places(server, layout, args.autoscaling)
    command = [args.python, "-P", "-m", "rlattn.cli", "train", CONFIG, *_how(args)]
    with Console() as console, TemporaryDirectory(prefix="rlattn-submit-") as temporary:
        folder = Path(temporary, "job")
        with console.phase("packing"):
            shipment.write(folder)
            wheel = args.wheel or build_wheel(Path(temporary))
            unpack(wheel, folder)
        if args.dry_run or server is None:
            lines = [*describe(layout), "nodes", *(f"  {line}" for line in places)]
            console.note("\n".join([*_listing(shipment, wheel, command, args.env), *lines]))
            return 0
        with console.phase("uploading"):
            job = server.ask(
                server.client.submit_job,
                entrypoint=shlex.join(command),
                submission_id=f"{args.name or Path(args.config).stem}-{uuid.uuid4().hex[:6]}",
                metadata={CONFIG_OF: str(args.config), OUTPUT: str(shipment.config.output_dir)},
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {name: os.environ[name] for name in args.env}
                    | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                },
            )
        console.note(f"job {job} at {server.address}")
        for line in places:
            console.note(f"  {line}")
        if args.no_wait:
            console.note(f"rlattn logs {job} follows it, rlattn stop {job} ends it with a checkpoint")
            return 0
        return _follow(server, job, console)


def jobs(args: argparse.Namespace) -> None:
    """Show the cluster's rlattn jobs, newest first."""
    own = [job for job in _server(args).jobs() if CONFIG_OF in (job.metadata or {})]
    rows = [["job", "status", "time", "config", "output_dir"]]
    rows += [
        [job.submission_id or "", job.status.value.lower(), _age(job), job.metadata[CONFIG_OF], job.metadata[OUTPUT]]
        for job in sorted(own, key=lambda job: -(job.start_time or 0))
        if job.metadata
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    with Console() as console:
        for row in rows if own else [["no rlattn jobs"]]:  # plain lines: a table would cut what one copies from here
            console.note("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def logs(args: argparse.Namespace) -> int:
    """Show a job's log, until its end if it still runs; returns its exit code."""
    server = _server(args)
    server.job(args.job)
    with Console() as console:
        return _follow(server, args.job, console)


def stop(args: argparse.Namespace) -> int:
    """Ask a job to stop after its step, with a checkpoint, and wait for that."""
    server = _server(args)
    job = server.job(args.job)
    with Console() as console:
        if job.status.is_terminal():
            console.note(f"job {args.job} has ended: {job.status.value.lower()}")
            return 0
        server.ask(server.client.stop_job, args.job)
        deadline = time.monotonic() + args.timeout
        with console.phase(f"waiting for job {args.job} to end its step and save"):
            while not (status := server.ask(server.client.get_job_status, args.job)).is_terminal():
                if time.monotonic() > deadline:
                    raise JobServerError(f"job {args.job} has not ended within {args.timeout:g} s; it was asked to")
                time.sleep(AGAIN_S)
        console.note(f"job {args.job}: {status.value.lower()}")
        return 0


def _places(server: JobServer | None, layout: Plan, autoscaling: bool) -> list[str]:
    """Which actors will sit on which of the cluster's nodes.

    Raises:
        NoRoom: they do not fit; says what is short.
    """
    if server is None:
        return ["not looked at: no --address"]
    found = server.nodes()
    if autoscaling:
        return [f"{len(found)} nodes now; the cluster may grow"]
    return describe_fit(layout, found, fit(layout, found))


def _server(args: argparse.Namespace) -> JobServer:
    for chatty in ("ray", dashboard_sdk.__name__, sdk.__name__):  # they tell of each upload and connection
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return JobServer(args.address, "--address")


def _how(args: argparse.Namespace) -> list[str]:
    if args.resume_from is not None:
        return ["--resume-from", str(args.resume_from)]
    return ["--resume"] * args.resume + ["--overwrite"] * args.overwrite


def _listing(shipment: Shipment, wheel: Path, command: list[str], env: list[str]) -> list[str]:
    """What would be shipped and run, for people; of environment variables the names alone."""
    files = [f"  {f.source} ({f.size / MIB:.1f} MiB) as {f.place}: `{f.key}`" for f in shipment.files]
    return [
        yaml.safe_dump(shipment.config.model_dump(mode="json"), sort_keys=False),
        f"ships rlattn {__version__} ({wheel.name}, {wheel.stat().st_size / MIB:.1f} MiB)",
        *(files or ["  no local files"]),
        f"runs {shlex.join(command)}",
        *([f"with {', '.join(env)} of this environment"] if env else []),
    ]


def _follow(server: JobServer, job: str, console: Console) -> int:
    """Show a job's log to its end; its exit code."""
    try:
        asyncio.run(_tail(server, job, console.note))
    except KeyboardInterrupt:
        console.note(f"job {job} goes on; rlattn logs {job} follows it, rlattn stop {job} ends it with a checkpoint")
        raise
    ended = server.job(job)
    if ended.status == JobStatus.STOPPED:
        return EXIT_CODE
    if ended.status == JobStatus.FAILED and ended.driver_exit_code is None:  # it did not get as far as running
        raise JobServerError(f"job {job} failed: {ended.message}")
    return ended.driver_exit_code or 0


async def _tail(server: JobServer, job: str, show: Callable[[str], None]) -> None:
    """Each line of a job's log, once, until the job has ended; a connection that breaks is made again.

    Raises:
        JobServerError: for `LOST_S` seconds in a row it could not be.
    """
    shown, noisy, heard, said = 0, False, time.monotonic(), time.monotonic()
    while True:
        try:
            status = server.ask(server.client.get_job_status, job)  # before the log, which is whole if it has ended
            if not shown and time.monotonic() - said > SILENCE_S:
                show(f"job {job} is {status.value.lower()}: its environment is set up")
                said = time.monotonic()
            seen = 0
            tail = cast(AsyncGenerator[str, None], server.client.tail_job_logs(job))
            async with aclosing(tail) as pieces:
                async for line in _lines(pieces):
                    seen, heard = seen + 1, time.monotonic()
                    if seen > shown:
                        shown = seen
                        noisy = bool(NOISE.match(line)) or (noisy and not line.strip())
                        if not noisy:
                            show(line)
            heard = time.monotonic()
            if status.is_terminal():
                return
        except TimeoutError:  # nothing new in the log for a while; the status tells whether that is all
            heard = time.monotonic()
        except (RuntimeError, OSError, ClientError) as error:
            if time.monotonic() - heard > LOST_S:
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise JobServerError(
                    f"job {job}: no connection to {server.address} for {LOST_S:g} s ({reason}). If it is back, rlattn "
                    f"logs {job} goes on; if the cluster is lost, submit again with --resume"
                ) from None
        await asyncio.sleep(AGAIN_S)


async def _lines(chunks: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """Whole lines of a stream of pieces; the last one at its end."""
    rest = ""
    while True:
        try:
            piece = await asyncio.wait_for(anext(chunks), SILENCE_S)
        except StopAsyncIteration:
            break
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _age(job: JobDetails) -> str:
    if not job.start_time:
        return ""
    return seconds((job.end_time or time.time() * 1000) / 1000 - job.start_time / 1000)
