"""Ray, bounded: starting it, reserving resources, and waiting for actors, each under a time-out with a clear error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.text import Text

from rlattn import trace
from rlattn.config import ConfigError, RunConfig
from rlattn.rollout.fit import Node, NoRoom, fit
from rlattn.rollout.placement import Plan, on_gpu

CAUSE_S = 5.0  # how long after a failed call another actor's death may become known
FETCH_S = 60.0  # longest wait for a result that is there already: only the copy
FIRST_NOTE_S, NOTE_S = 5.0, 30.0  # when the user is told of a wait for room, and how often then
PAUSE_S = 0.05  # between two looks, where the last ended at once
SHARED_S = 120.0  # longest wait for nodes to look at shared paths; a worker is started for it
LOG_LINES, LOG_BYTES = 6, 4096  # of its log's end that are shown, and read
CAUSE_LINES = 12  # of a failed actor's own error that are shown
LOCAL_OBJECT_STORE_BYTES = 1 << 30  # without GPUs: weights of small models and rollouts; larger objects spill to disk


class Place(NamedTuple):
    """Where an actor lives: its node's address and its process."""

    node: str
    pid: int


_places: dict[str, Place] = {}  # of one driver's actors, by name: for the errors that name them
_logs: list[str] = []  # where Ray keeps what they print, once it is started


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
    session = context.address_info.get("session_dir")
    _logs[:] = [f"{session}/logs"] if session else []
    return _logs[0] if _logs else "(on the cluster)"


def local_cpus(config: RunConfig, plan: Plan) -> int:
    """Logical CPUs of a Ray started here: what the run's actors reserve, or the machine's where it has more.

    Raises:
        ConfigError: `ray.num_cpus` cannot hold the run's actors.
    """
    num_cpus = config.ray.num_cpus or max(len(os.sched_getaffinity(0)), plan.cpus)
    if config.ray.address is None and num_cpus < plan.cpus:
        raise ConfigError(f"`ray.num_cpus` = {num_cpus}: the run's actors reserve {plan.cpus}; raise it or unset it")
    return num_cpus


def reserve(config: RunConfig, plan: Plan, note: Callable[[str], None] = lambda text: None) -> PlacementGroup:
    """Reserve the plan's bundles, waiting at most `ray.placement_timeout_s`; `note` tells the user of the wait.

    Raises:
        ActorError: says what is asked, what the cluster has, and what is short.
    """
    group = placement_group(
        [dict(bundle) for bundle in plan.bundles], strategy="PACK", bundle_label_selector=plan.selectors
    )
    # A local Ray never grows, so there is nothing to wait for.
    timeout = 0.0 if config.ray.address is None and _short(plan) else config.ray.placement_timeout_s
    start = time.monotonic()
    due = start + FIRST_NOTE_S
    while not group.wait(min(1, timeout)):  # Ray counts whole seconds
        now = time.monotonic()
        if now - start >= timeout:
            remove_placement_group(group)
            raise ActorError(
                f"no room for the run's actors{f' after {timeout:g} s' if timeout else ''}: they ask for {plan.cpus} "
                f"CPUs and {plan.gpus:g} GPUs in bundles {plan.bundles}; the cluster has {_has()}{_short(plan)}"
            )
        if now >= due:
            note(f"waiting for room, {now - start:.0f} of {timeout:g} s: the cluster has {_has()}{_short(plan)}")
            due = now + NOTE_S
        time.sleep(PAUSE_S)
    return group


def nodes() -> list[Node]:
    """The living nodes of the cluster."""
    return [
        Node(node["NodeManagerAddress"], node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]
    ]


def check_shared(group: PlacementGroup, paths: Mapping[str, Path]) -> None:
    """Make sure that every node of the run sees what lies under `paths`, by the setting that names each.

    Raises:
        ConfigError: one does not; names the node and the path.
    """
    probes = {setting: path for setting, path in paths.items() if path.exists()}
    first = {node: bundle for bundle, node in ray.util.placement_group_table(group)["bundles_to_node_id"].items()}
    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(_unseen)
    calls = {
        f"node {node[:8]}": look.options(
            num_cpus=0, scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        ).remote({setting: str(path.absolute()) for setting, path in probes.items()})
        for node, bundle in first.items()
        if node != here
    }
    wrong = [line for lines in collect(calls, phase="looking at shared paths", timeout_s=SHARED_S) for line in lines]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _unseen(paths: dict[str, str]) -> list[str]:
    address = ray.util.get_node_ip_address()
    return [
        f"`{setting}` = {path!r} is not there on node {address}; put it on storage that all nodes share"
        for setting, path in paths.items()
        if not os.path.exists(path)
    ]


def _has() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{total.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))


def _short(plan: Plan) -> str:
    """What an empty cluster would lack; nothing where others use what is there."""
    try:
        fit(plan, nodes())
    except NoRoom as error:
        return f"; {error}"
    return ""


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
            silent = [names[ref] for ref in pending]
            where = "".join(map(whereabouts, silent))
            raise ActorLost(f"{phase}: no answer from {', '.join(silent)} within {timeout_s:g} s{where}")
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
        raise ActorLost(f"{phase}: no answer from {name} within {limit:g} s{whereabouts(name)}") from None
    except RayTaskError as error:
        raise ActorError(f"{phase}: {name} failed:\n{_last_lines(error)}") from None
    except RayError as error:
        raise ActorLost(f"{phase}: {name} died:\n{_last_lines(error)}{whereabouts(name)}") from None


def place() -> Place:
    """Of this process."""
    return Place(ray.util.get_node_ip_address(), os.getpid())


def remember(name: str, where: Place) -> None:
    """Have errors about an actor say where it lived, and show the end of its log where that can be read from here."""
    _places[name] = where


def whereabouts(name: str) -> str:
    """Where an actor was, and the end of its log, as far as that is known here; lines for an error's end."""
    if name not in _places:
        return ""
    node, pid = _places[name]
    said = f"\n  it was process {pid} on node {node}"
    for log in (path for folder in _logs for path in Path(folder).glob(f"worker-*-{pid}.err")):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            end = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-LOG_LINES:]
        if end:
            said += f"; the end of its log {log}:" + "".join(f"\n    {line}" for line in end)
    return said


def _last_lines(error: Exception) -> str:
    plain = Text.from_ansi(str(error)).plain  # Ray colours its messages for terminals
    lines = [line for line in plain.splitlines() if line.strip(" ^~")]
    return "\n".join(f"  {line}" for line in lines[-CAUSE_LINES:])
