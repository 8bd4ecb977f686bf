"""A Ray cluster of several nodes on this machine, each in a network namespace of its own, with a token at its door."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RAY = [sys.executable, "-P", "-m", "ray.scripts.scripts"]
MORTAL = ["setpriv", "--pdeathsig", "KILL"]  # nodes must not outlive a test run that is killed
START_S = 90
CLIENT = 253


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces, as root can unless it is confined."""
    probe = f"rl{os.getpid()}"
    if os.geteuid() or not all(map(shutil.which, ("ip", "setpriv"))):
        return False
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", probe], check=True)
    return made


class Nodes:
    """Nodes on a bridge 10.213.0.0/24; node 0 is the head, with the job server. A context manager.

    Whoever asks the job server has a namespace, too (`client` begins its command): the machine's own network has no
    part in it, so that neither a proxy, a firewall nor what another run has left there comes between.
    """

    def __init__(self, logs: Path) -> None:
        self.logs, self.token = logs, secrets.token_hex(32)
        self.temp = Path(f"/tmp/rlattn-{os.getpid()}")
        self.bridge = f"rlb{os.getpid()}"
        self.address = "http://10.213.0.1:8265"
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.client = ["ip", "netns", "exec", self._space(CLIENT)]

    def __enter__(self) -> Nodes:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        self._connect(CLIENT)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self.running):
            self.kill(number)
        self._disconnect(CLIENT)
        _ip("link", "delete", self.bridge)
        shutil.rmtree(self.temp, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever knows the token."""
        direct = dict.fromkeys(("no_proxy", "NO_PROXY"), "*")
        return os.environ | direct | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, number: int, cpus: int, *, private: Path | None = None, **labels: str) -> None:
        """Start node `number`, at 10.213.0.<number + 1>, and wait for it: two at once would take the same socket.

        `private` is a folder that is empty there and nobody else's, as where storage is not shared.
        """
        own = self._connect(number)
        where = ["--address=10.213.0.1:6379"]
        if number == 0:
            where = [
                "--head",
                "--port=6379",
                f"--dashboard-host={own}",
                "--dashboard-port=8265",
                f"--temp-dir={self.temp}",
            ]
        command = [*RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={own}", f"--num-cpus={cpus}"]
        command += [
            *where,
            "--num-gpus=0",
            "--object-store-memory=200000000",
            f"--labels-file={self._labels(number, labels)}",
        ]
        hidden = []
        if private:
            hidden = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{private}" && exec "$@"', "-"]
        output = self.logs / f"node-{number}.log"
        with open(output, "wb") as log:
            self.running[number] = subprocess.Popen(
                [*MORTAL, "ip", "netns", "exec", self._space(number), *hidden, *command],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        wait_for(lambda: b"will now block" in output.read_bytes(), f"node {number}: {output}")

    def kill(self, number: int) -> None:
        """Everything on a node dies at once, and its network is gone."""
        process = self.running.pop(number)
        pids = subprocess.run(
            ["ip", "netns", "pids", self._space(number)], capture_output=True, text=True, check=True
        ).stdout
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.kill()
        process.wait(timeout=30)
        self._disconnect(number)

    def _connect(self, number: int) -> str:
        """A namespace on the bridge; its address."""
        space, outside, own = self._space(number), self._outside(number), f"10.213.0.{number + 1}"
        _ip("netns", "add", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "lan0", "netns", space)
        _ip("link", "set", outside, "master", self.bridge, "up")
        for command in (["address", "add", f"{own}/24", "dev", "lan0"], ["link", "set", "lan0", "up"]):
            _ip("-n", space, *command)
        _ip("-n", space, "link", "set", "lo", "up")
        return own

    def _disconnect(self, number: int) -> None:
        _ip("link", "delete", self._outside(number))  # at once: with its namespace it would go some time later
        _ip("netns", "delete", self._space(number))

    def _outside(self, number: int) -> str:
        return f"{self.bridge}n{number}"[:15]

    def _space(self, number: int) -> str:
        return f"{self.bridge}-{number}"

    def _labels(self, number: int, labels: dict[str, str]) -> Path:
        file = self.logs / f"labels-{number}.yaml"
        file.write_text(json.dumps(labels))
        return file


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
