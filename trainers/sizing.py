"""`rlattn plan`: whether a config fits a cluster on paper, its actors on the nodes and its bytes on the GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlattn.config import RunConfig, load_config
from rlattn.console import Console
from rlattn.rollout.engine_args import check_engine_args
from rlattn.rollout.fit import Node, NoRoom, alike, describe_fit, fit
from rlattn.rollout.placement import Plan, on_gpu, plan
from rlattn.trainers.memory import GIB, MemoryEstimate, estimate, responses_per_engine

USABLE = 0.95  # of a GPU's memory: the rest goes to CUDA contexts, NCCL and fragments


def run(args: argparse.Namespace) -> None:
    """Show where everybody would sit and what each would take; raises NoRoom where that cannot be."""
    config = load_config(args.config, args.overrides)
    check_engine_args(config)
    nodes = alike(args.nodes, GPU=args.gpus, CPU=args.cpus)
    with Console() as console:
        for line in study(config, nodes, args.gpu_memory):
            console.note(line)


def study(config: RunConfig, nodes: Sequence[Node], gpu_gib: float) -> list[str]:
    """Who sits where, and what it takes of a GPU of `gpu_gib` GiB.

    Raises:
        NoRoom: too few nodes, or too little memory; says what is short and what would help.
    """
    layout, needs = plan(config), estimate(config)
    places = fit(layout, nodes)
    lines = [*describe_fit(layout, nodes, places), *needs.lines()]
    if on_gpu(config):
        lines += check_memory(config, layout, needs, gpu_gib)
    return lines


def check_memory(config: RunConfig, layout: Plan, needs: MemoryEstimate, gpu_gib: float) -> list[str]:
    """What actors that share a GPU take of it together, a line for each kind of sharing.

    Raises:
        NoRoom: more than there is.
    """
    own = {"policy rank": sum(needs.policy.values()), "engine": _engine_floor(config, needs, gpu_gib)}
    own["critic rank"] = sum(needs.critic.values()) if needs.critic else 0.0
    lines = []
    for kinds in dict.fromkeys(
        tuple(name.rpartition(" ")[0] for name in layout.actors(b)) for b in range(len(layout.bundles))
    ):
        taken = sum(own[kind] for kind in kinds) / GIB
        shared = " + ".join(kinds)
        if config.rollout.sleep and {"engine", "policy rank"} <= set(kinds):
            taken = max(taken - own["engine"] / GIB, (needs.kept + own["engine"]) / GIB)
            shared += " by turns"
        share = f"{shared}: {taken:.1f} of {gpu_gib:g} GiB"
        if taken > USABLE * gpu_gib:
            raise NoRoom(f"{share}: {taken - USABLE * gpu_gib:.1f} GiB short; {_advice(config, kinds)}")
        lines.append(f"{share} a GPU")
    return lines


def _engine_floor(config: RunConfig, needs: MemoryEstimate, gpu_gib: float) -> float:
    """Bytes that an engine takes of a GPU: what it is told to, but at least its weights and one longest sequence."""
    if config.rollout.kv_cache_gib:
        return sum(needs.engine.values())
    told = config.rollout.gpu_memory_utilization * gpu_gib * GIB
    return max(told, needs.engine["weights"] + needs.engine["KV cache"] / responses_per_engine(config))


def _advice(config: RunConfig, kinds: Sequence[str]) -> str:
    zero = config.policy.deepspeed.get("zero_optimization", {})
    ways = []
    if "policy rank" in kinds or "critic rank" in kinds:
        if zero.get("stage", 0) < 3:
            ways.append("policy.deepspeed={zero_optimization: {stage: 3}}")
        ways.append("more policy.ranks" if zero.get("stage", 0) else "a ZeRO stage")
        if not config.policy.gradient_checkpointing:
            ways.append("policy.gradient_checkpointing=true")
        if "offload_optimizer" not in zero:
            ways.append("offload_optimizer in policy.deepspeed")
        ways.append("policy.lora")
    if "engine" in kinds:
        if "policy rank" in kinds and not config.rollout.sleep and not config.rollout.steps_ahead:
            ways.append("rollout.sleep=true")
        ways += ["a larger rollout.tensor_parallel_size", "a smaller rollout.gpu_memory_utilization or kv_cache_gib"]
    return f"what helps: {', '.join(dict.fromkeys(ways))}"
