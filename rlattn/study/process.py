"""Runs as processes of this machine: a crash takes one run, and its memory comes back."""

from __future__ import annotations

import os
import subprocess
import sys

from rlattn.study.config import Run
from rlattn.study.runner import TAIL_LINES, Ended

LOG = "train.log"
STOP_TIMEOUT_S = 60  # a run that is interrupted shuts Ray down first


class Processes:
    """A launcher whose runs end with this process. The output of a run goes to `train.log` in its folder."""

    def __init__(self, lock: int, at_once: int) -> None:
        """`lock` is a file descriptor that runs keep open for as long as they live, `at_once` how many run at most."""
        self.at_once = at_once
        self._lock = lock
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, run: Run) -> None:
        """Start a run, or go on with it."""
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "rlattn.study.child", str(os.getpid()), *run.arguments()]
        with open(run.folder / LOG, "ab") as log:
            self._running[run.name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=[self._lock]
            )

    def poll(self, run: Run) -> Ended | None:
        """How a run ended, or None while it runs."""
        code = self._running[run.name].poll()
        if code is None:
            return None
        del self._running[run.name]
        log = run.folder / LOG
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return Ended(f"exit code {code}", str(log), lines)

    def stop(self, run: Run) -> None:
        """End a run."""
        self._end([self._running[run.name]])

    def leave(self) -> str:
        """End the runs, as this process ends."""
        self._end(list(self._running.values()))
        return "the same command goes on where this one stopped"

    @staticmethod
    def _end(processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
