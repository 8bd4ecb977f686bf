"""From a run's config to `vllm.LLM` arguments and the actor's environment. Pure: imports neither vllm nor ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rlattn.config import ConfigError, RunConfig
from rlattn.config.policy import MAX_SERVED_RANK
from rlattn.rollout.placement import on_gpu

# vLLM keys that rlattn sets; setting them twice would mean that one of the two is ignored.
OWNED_ENGINE_ARGS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "seed": "seed",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "max_model_len": "rollout.max_prompt_length and rollout.max_completion_length",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "enforce_eager": "rollout.enforce_eager",
    "enable_sleep_mode": "rollout.sleep",
    "weight_transfer_config": "rollout.weight_transfer",
    "logprobs_mode": "rlattn (log-probs at the sampling temperature)",
    "distributed_executor_backend": "rlattn (the engine lives in its actor)",
    "worker_extension_cls": "rlattn (weight transfer)",
    "worker_cls": "signals.forward",
    "additional_config": "signals.forward",
    "disable_cascade_attn": "rlattn (off, as is vLLM's default)",
    "disable_log_stats": "rlattn",
    "enable_lora": "policy.lora.sync",
    "max_loras": "policy.lora.sync",
    "max_lora_rank": "policy.lora.r",
}
# vLLM's CPU engine cannot draw from per-request seeds under chunked prefill, so there it is rlattn's to set.
OWNED_ON_CPU = {"enable_chunked_prefill": "rlattn (off on CPUs, where it breaks per-request seeds)"}

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, MAX_SERVED_RANK)  # those that vLLM has room for

SCORED_BESIDE = 2  # tokens that a prefill of a whole sequence has beside it, see `rlattn.rollout.attention`
CPU_KV_CACHE_GIB = 1.0  # where `rollout.kv_cache_gib` is unset: vLLM's own default is a share of all memory


def check_engine_args(config: RunConfig) -> None:
    """Refuse `rollout.engine_args` that rlattn sets itself; starts nothing.

    Raises:
        ConfigError: names every such key and the field that owns it.
    """
    owners = OWNED_ENGINE_ARGS if on_gpu(config) else OWNED_ENGINE_ARGS | OWNED_ON_CPU
    taken = [f"{key!r} is set by {owners[key]}" for key in config.rollout.engine_args if key in owners]
    if taken:
        raise ConfigError(f"`rollout.engine_args`: {'; '.join(taken)}; remove from here")


def engine_args(
    config: RunConfig, model_path: str, backend: str | None = None, layers: Sequence[int] = ()
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for one engine of this run.

    `backend` is how vLLM is given weights, if by GPU; `layers` are those that sampling is listened to in, if it is.
    """
    check_engine_args(config)
    rollout = config.rollout
    length = rollout.max_prompt_length + rollout.max_completion_length
    if config.signals.source == "rollout":
        length += SCORED_BESIDE
    owned: dict[str, Any] = {
        "model": model_path,
        "dtype": config.model.dtype,
        "seed": config.seed % 2**32,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "max_model_len": length,
        "enforce_eager": rollout.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": "uni" if rollout.tensor_parallel_size == 1 else "mp",
        "worker_extension_cls": "rlattn.rollout.worker.WorkerExtension",
        "disable_log_stats": True,
    }
    if config.signals.forward == "decode":
        from rlattn.rollout.decoding import listening_args  # torch, which checks at the door do without
        from rlattn.signals import statistics_options

        owned |= listening_args(layers, statistics_options(config.signals))
    if backend:
        owned["weight_transfer_config"] = {"backend": backend}
    if config.policy.sends_adapters:
        assert config.policy.lora
        rank = next(rank for rank in LORA_RANKS if rank >= config.policy.lora.r)
        owned |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    defaults: dict[str, Any] = {}
    kv_cache_gib = rollout.kv_cache_gib
    if on_gpu(config):
        owned["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        owned["enable_sleep_mode"] = rollout.sleep
    else:
        kv_cache_gib = kv_cache_gib or CPU_KV_CACHE_GIB
        owned["enable_chunked_prefill"] = False
        # Blocks of 32, not the CPU default of 128: only whole blocks of a group's prompt are shared.
        defaults = {"max_num_seqs": 256, "max_num_batched_tokens": max(8192, length), "block_size": 32}
    if kv_cache_gib is not None:
        owned["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return defaults | rollout.engine_args | owned


def engine_env(config: RunConfig) -> dict[str, str]:
    """Environment of an engine's actor, set by Ray before its Python starts.

    In-process engine core: errors arrive whole, nothing outlives the actor, and a CPU engine starts twice as fast.
    """
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if on_gpu(config):
        return env | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it knows no per-request seeds, and may not be installed
    # Generation and training alternate, so an engine may use every core, whatever Ray reserved for it.
    cores = max(1, len(os.sched_getaffinity(0)) // config.rollout.num_engines)
    # Passive: threads that wait must not spin. Where anything else wants the cores, spinning cost 6 to 9 times here.
    env |= {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"}
    if config.rollout.enforce_eager:
        # vLLM compiles helpers of its sampler even in eager mode: the first call took 28 s, without it 6 s.
        env |= {"TORCH_COMPILE_DISABLE": "1"}
    return env
