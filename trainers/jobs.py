"""A study's runs as Ray jobs. They outlive the study's process: the same study, called again, follows them."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from rlattn.config import ConfigError
from rlattn.study.config import LaunchConfig, Run
from rlattn.study.runner import TAIL_LINES, Ended

CALL_TIMEOUT_S = 120  # of the job server; its client has no time-outs
RUN = "rlattn_run"
"""Metadata key: the run's folder, by which a job is found again."""

T = TypeVar("T")


class JobServerError(RuntimeError):
    """The cluster's job server does not answer; jobs already there go on."""


class Jobs:
    """A launcher on the cluster's job server.

    Raises:
        ConfigError: there is none at `launch.address`.
    """

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch
        self.at_once = launch.at_once
        self._side = ThreadPoolExecutor(1, thread_name_prefix="job-server")
        try:
            self._client = self._ask(JobSubmissionClient, launch.address)
        except (ConnectionError, RuntimeError, RayError) as error:  # not there, another version, no token for it
            reason = str(error).splitlines()[0]
            raise ConfigError(f"`launch.address` = {launch.address!r}: no Ray job server to use: {reason}") from None
        self._jobs = {
            job.metadata[RUN]: job.submission_id
            for job in self._ask(self._client.list_jobs)
            if job.metadata and RUN in job.metadata and job.submission_id and not job.status.is_terminal()
        }

    def start(self, run: Run) -> None:
        """Submit a run, or follow the job that an earlier call has submitted for it."""
        key = _key(run)
        if key in self._jobs:
            return
        command = shlex.join([self._launch.python, "-P", "-m", "rlattn.cli", *run.arguments()])
        self._jobs[key] = self._ask(
            self._client.submit_job,
            entrypoint=f"cd {shlex.quote(str(Path.cwd()))} && exec {command}",
            submission_id=f"{run.arm}-seed{run.seed}-{uuid.uuid4().hex[:8]}",
            metadata={RUN: key},
            runtime_env=dict(self._launch.runtime_env),
        )

    def poll(self, run: Run) -> Ended | None:
        """How a run ended, or None while its job waits or runs."""
        job = self._jobs[_key(run)]
        status: JobStatus = self._ask(self._client.get_job_status, job)
        if not status.is_terminal():
            return None
        del self._jobs[_key(run)]
        lines = self._ask(self._client.get_job_logs, job).splitlines()[-TAIL_LINES:]
        return Ended(f"job {status.value.lower()}", f"the log of Ray job {job}", lines)

    def stop(self, run: Run) -> None:
        """Ask the server to stop a run's job."""
        self._ask(self._client.stop_job, self._jobs[_key(run)])

    def leave(self) -> str:
        """Jobs go on without this process."""
        self._side.shutdown(wait=False, cancel_futures=True)
        return f"{len(self._jobs)} Ray jobs go on; the same command follows them" if self._jobs else ""

    def _ask(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            return self._side.submit(call, *args, **kwargs).result(CALL_TIMEOUT_S)
        except TimeoutError:
            raise JobServerError(f"no answer from Ray's job server within {CALL_TIMEOUT_S} s; jobs go on") from None


def _key(run: Run) -> str:
    return str(run.folder.absolute())
