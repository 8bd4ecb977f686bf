"""Ray, bounded: starting it, reserving resources, and waiting for actors, each under a time-out with a clear error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from rich.text import Text

from rlattn import trace
from rlattn.config import ConfigError, RunConfig
from rlattn.rollout.placement import Plan, on_gpu

CAUSE_S = 5.0  # how long after a failed call another actor's death may become known
FETCH_S = 60.0  # longest wait for a result that is there already: only the copy
CAUSE_LINES = 12  # of a failed actor's own error that are shown
LOCAL_OBJECT_STORE_BYTES = 1 << 30  # without GPUs: weights of small models and rollouts; larger objects spill to disk


class ActorError(RuntimeError):
    """An actor died, failed or did not answer in time; the message names it, the phase and the cause."""


class ActorLost(ActorError):
    """It died or did not answer in time, so that another in its place may do better; otherwise its own code failed."""


def start_ray(config: RunConfig, plan: Plan) -> str:
    """Connect to the cluster at `ray.address`, or start Ray on this machine; returns the folder of Ray's logs.

    The console stays quiet: actors' output goes to files in that folder, their errors come back as exceptions. A local
    Ray ends with this process, however that ends.

    Raises:
        ConfigError: `ray.num_cpus` cannot hold the run's actors.
        ActorError: no cluster at the address.
    """
    local: dict[str, Any] = {}
    if config.ray.address is None:
        local = {"num_cpus": local_cpus(config, plan), "include_dashboard": False}
        if not on_gpu(config):
            local |= {"num_gpus": 0, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    # Ray reads these when it is started; it has no arguments for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        # "local" rather than None: None would join a cluster named by RAY_ADDRESS or already running here.
        context: Any = ray.init(
            address=config.ray.address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "rlattn.rollout.worker_setup.claim_kernels"},
            **local,
        )
    except ConnectionError as error:
        raise ActorError(f"no Ray cluster at ray.address={config.ray.address!r}: {_last_lines(error)}") from None
    return (
        f"{context.address_info['session_dir']}/logs" if "session_dir" in context.address_info else "(on the cluster)"
    )


def local_cpus(config: RunConfig, plan: Plan) -> int:
    """Logical CPUs of a Ray started here: what the run's actors reserve, or the machine's where it has more.

    Raises:
        ConfigError: `ray.num_cpus` cannot hold the run's actors.
    """
    num_cpus = config.ray.num_cpus or max(len(os.sched_getaffinity(0)), plan.cpus)
    if config.ray.address is None and num_cpus < plan.cpus:
        raise ConfigError(f"`ray.num_cpus` = {num_cpus}: the run's actors reserve {plan.cpus}; raise it or unset it")
    return num_cpus


def reserve(config: RunConfig, plan: Plan) -> PlacementGroup:
    """Reserve the plan's bundles, waiting at most `ray.placement_timeout_s`.

    Raises:
        ActorError: says what is asked and what the cluster has.
    """
    group = placement_group([dict(bundle) for bundle in plan.bundles], strategy="PACK")
    total = ray.cluster_resources()
    # A local Ray never grows, so there is nothing to wait for.
    hopeless = config.ray.address is None and (plan.cpus > total.get("CPU", 0) or plan.gpus > total.get("GPU", 0))
    timeout = config.ray.placement_timeout_s
    if hopeless or not group.wait(timeout):
        remove_placement_group(group)
        free = ray.available_resources()
        has = ", ".join(f"{total.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
        waited = "" if hopeless else f" after {timeout:g} s"
        raise ActorError(
            f"no room for the run's actors{waited}: they ask for {plan.cpus} CPUs and {plan.gpus:g} GPUs in bundles "
            f"{plan.bundles}; the cluster has {has}"
        )
    return group


def collect(calls: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float) -> list[Any]:
    """Results of one remote call per named actor, in order.

    Fails as soon as one call fails, but for `CAUSE_S` seconds in which another may turn out to have died: where actors
    work together, the death of one makes the others' calls fail.

    Raises:
        ActorError: names the actor that died, failed or is still silent after `timeout_s`, the phase and the cause.
    """
    names = {ref: name for name, ref in calls.items()}
    start, deadline = time.perf_counter(), time.monotonic() + timeout_s
    pending, answers = list(names), {}
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = ", ".join(names[ref] for ref in pending)
            raise ActorLost(f"{phase}: no answer from {silent} within {timeout_s:g} s")
        trace.span(names[ready[0]], phase, start)
        try:
            answers[ready[0]] = outcome(ready[0], names[ready[0]], phase, FETCH_S)
        except ActorLost:
            raise
        except ActorError:
            others = ray.wait(pending, num_returns=len(pending), timeout=CAUSE_S)[0] if pending else []
            for ref in others:
                try:
                    outcome(ref, names[ref], phase, FETCH_S)
                except ActorLost:
                    raise
                except ActorError:
                    continue
            raise
    return [answers[ref] for ref in calls.values()]


def outcome(ref: ray.ObjectRef, name: str, phase: str, left_s: float, timeout_s: float | None = None) -> Any:
    """The result of one call, waiting `left_s` of the `timeout_s` that it had from the start.

    Raises:
        ActorLost: the actor died, or is silent.
        ActorError: the call failed.
    """
    try:
        return ray.get(ref, timeout=max(0.0, left_s))
    except GetTimeoutError:
        limit = left_s if timeout_s is None else timeout_s
        raise ActorLost(f"{phase}: no answer from {name} within {limit:g} s") from None
    except RayTaskError as error:
        raise ActorError(f"{phase}: {name} failed:\n{_last_lines(error)}") from None
    except RayError as error:
        raise ActorLost(f"{phase}: {name} died:\n{_last_lines(error)}") from None


def _last_lines(error: Exception) -> str:
    plain = Text.from_ansi(str(error)).plain  # Ray colours its messages for terminals
    lines = [line for line in plain.splitlines() if line.strip(" ^~")]
    return "\n".join(f"  {line}" for line in lines[-CAUSE_LINES:])
