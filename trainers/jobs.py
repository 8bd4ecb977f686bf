"""Ray's job server, bounded: every call has a time-out and a clear error; and a study's runs as its jobs."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from rlattn.config import ConfigError
from rlattn.rollout.fit import Node
from rlattn.study.config import LaunchConfig, Run
from rlattn.study.runner import TAIL_LINES, Ended

CALL_TIMEOUT_S = 120  # of the job server; its client has no time-outs
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
RUN = "rlattn_run"
"""Metadata key: the run's folder, by which a job is found again."""

T = TypeVar("T")


class JobServerError(RuntimeError):
    """The cluster's job server does not answer, or refuses; jobs already there go on."""


class JobServer:
    """The job server at an address such as `http://head:8265`; None means what RAY_API_SERVER_ADDRESS says.

    The token that a cluster asks for is Ray's to find: in RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or
    `~/.ray/auth_token`.

    Raises:
        ConfigError: none is there, or it lets nobody in without a token; `setting` is who named the address.
    """

    def __init__(self, address: str | None, setting: str) -> None:
        self.address = address or os.environ.get(ADDRESS_VARIABLE)
        self._side = ThreadPoolExecutor(1, thread_name_prefix="job-server")
        if not self.address:
            raise ConfigError(f"no cluster named; give {setting} (http://head:8265) or set {ADDRESS_VARIABLE}")
        try:
            self.client = self.ask(JobSubmissionClient, self.address)
        except (ConnectionError, RuntimeError, RayError) as error:  # not there, another version, no token for it
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "auth" in reason.lower():
                reason += "; the cluster's token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            elif proxy := _proxy(self.address):
                reason += f"; asked through the proxy that {proxy} names, NO_PROXY={_host(self.address)} asks directly"
            raise ConfigError(f"{setting} = {self.address!r}: no Ray job server to use: {reason}") from None

    def ask(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The answer to a call of the client's.

        Raises:
            JobServerError: none within `CALL_TIMEOUT_S`.
        """
        try:
            return self._side.submit(call, *args, **kwargs).result(CALL_TIMEOUT_S)
        except TimeoutError:
            raise JobServerError(f"no answer from Ray's job server within {CALL_TIMEOUT_S} s; jobs go on") from None

    def jobs(self) -> list[JobDetails]:
        """Every job that the server knows."""
        return self.ask(self.client.list_jobs)

    def job(self, name: str) -> JobDetails:
        """One of them.

        Raises:
            ConfigError: there is none of that name.
        """
        found = {job.submission_id: job for job in self.jobs() if job.submission_id}
        if name not in found:
            raise ConfigError(f"{self.address} knows no job {name!r}; there are: {', '.join(found) or 'none'}")
        return found[name]

    def nodes(self) -> list[Node]:
        """The cluster's living nodes."""
        states = self.ask(list_nodes, address=self.address, limit=10_000, timeout=CALL_TIMEOUT_S)
        return [Node(state.node_ip, state.resources_total, state.labels) for state in states if state.state == "ALIVE"]

    def close(self) -> None:
        """Let go of it."""
        self._side.shutdown(wait=False, cancel_futures=True)


class Jobs:
    """A launcher of a study's runs as jobs. They outlive the study's process, which follows them when called again.

    Raises:
        ConfigError: no job server at `launch.address`.
    """

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch
        self.at_once = launch.at_once
        self._server = JobServer(launch.address, "`launch.address`")
        self._jobs = {
            job.metadata[RUN]: job.submission_id
            for job in self._server.jobs()
            if job.metadata and RUN in job.metadata and job.submission_id and not job.status.is_terminal()
        }

    def start(self, run: Run) -> None:
        """Submit a run, or follow the job that an earlier call has submitted for it."""
        key = _key(run)
        if key in self._jobs:
            return
        command = shlex.join([self._launch.python, "-P", "-m", "rlattn.cli", *run.arguments()])
        self._jobs[key] = self._server.ask(
            self._server.client.submit_job,
            entrypoint=f"cd {shlex.quote(str(Path.cwd()))} && exec {command}",
            submission_id=f"{run.arm}-seed{run.seed}-{uuid.uuid4().hex[:8]}",
            metadata={RUN: key},
            runtime_env=dict(self._launch.runtime_env),
        )

    def poll(self, run: Run) -> Ended | None:
        """How a run ended, or None while its job waits or runs."""
        job = self._jobs[_key(run)]
        status: JobStatus = self._server.ask(self._server.client.get_job_status, job)
        if not status.is_terminal():
            return None
        del self._jobs[_key(run)]
        lines = self._server.ask(self._server.client.get_job_logs, job).splitlines()[-TAIL_LINES:]
        return Ended(f"job {status.value.lower()}", f"the log of Ray job {job}", lines)

    def stop(self, run: Run) -> None:
        """Ask the server to stop a run's job."""
        self._server.ask(self._server.client.stop_job, self._jobs[_key(run)])

    def leave(self) -> str:
        """Jobs go on without this process."""
        self._server.close()
        return f"{len(self._jobs)} Ray jobs go on; the same command follows them" if self._jobs else ""


def _key(run: Run) -> str:
    return str(run.folder.absolute())


def _host(address: str) -> str:
    return urlsplit(address).hostname or address


def _proxy(address: str) -> str | None:
    """The variable whose proxy is asked instead of `address`; not its value, which may carry a password."""
    scheme = urlsplit(address).scheme
    known = scheme in getproxies() and not proxy_bypass(_host(address))
    return f"{scheme}_proxy" if known else None
