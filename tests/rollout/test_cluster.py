"""Ray itself: resources that do not fit, calls that hang, and a driver killed by -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from rollout_tiny import run_config

from rlattn.config import ConfigError
from rlattn.rollout.placement import plan

DRIVER = """
import os, ray, sys, time
from rlattn.config import RunConfig
from rlattn.rollout.cluster import start_ray
from rlattn.rollout.placement import plan
config = RunConfig.model_validate_json(sys.argv[1])
start_ray(config, plan(config))
pid = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
print(pid, ray._private.worker._global_node.all_processes["raylet"][0].process.pid, flush=True)
time.sleep(120)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_local_ray_smaller_than_the_run_is_refused() -> None:
    from rlattn.rollout.cluster import start_ray

    config = run_config(policy={"gpus_per_rank": 0, "ranks": 3}, ray={"num_cpus": 2})
    with pytest.raises(ConfigError, match=r"`ray\.num_cpus` = 2: the run's actors reserve 4"):
        start_ray(config, plan(config))


@pytest.mark.slow
def test_reserve_says_what_is_asked_and_what_there_is(local_ray, monkeypatch) -> None:
    from rlattn.rollout.cluster import ActorError, reserve

    config = run_config(policy={"gpus_per_rank": 0, "ranks": 9})
    with pytest.raises(ActorError, match=r"ask for 10 CPUs and 0 GPUs .* the cluster has 4 CPUs \(4 free\), 0 GPUs"):
        reserve(config, plan(config))
    fits = run_config(policy={"gpus_per_rank": 0, "ranks": 3})
    assert [bundle["CPU"] for bundle in reserve(fits, plan(fits)).bundle_specs] == [1, 1, 1, 1]
    late = run_config(policy={"gpus_per_rank": 0, "ranks": 3}, ray={"placement_timeout_s": 1})
    with pytest.raises(ActorError, match=r"after 1 s: .* 4 CPUs \(0 free\)"):
        reserve(late, plan(late))
    notes: list[str] = []
    monkeypatch.setattr("rlattn.rollout.cluster.FIRST_NOTE_S", 0.2)
    later = run_config(policy={"gpus_per_rank": 0, "ranks": 3}, ray={"placement_timeout_s": 2.5})
    with pytest.raises(ActorError, match=r"after 2\.5 s"):
        reserve(later, plan(later), notes.append)
    assert notes == ["waiting for room, 1 of 2.5 s: the cluster has 4 CPUs (0 free), 0 GPUs (0 free)"]


@pytest.mark.slow
def test_local_ray_dies_with_a_killed_driver() -> None:
    command = [sys.executable, "-P", "-c", DRIVER, run_config().model_dump_json()]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=10)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in pids)
