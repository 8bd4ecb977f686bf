"""A memory estimate: what the weights, optimizer, activations and KV cache of a config will take, before it is started.

Bytes per parameter follow the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3): weights, gradients, and
AdamW's fp32 master weights and two moments, each divided by the ranks from the stage that shards it. On top comes the
larger of what the forward keeps and of the gradients in the weights' type that backward leaves until the step.
`docs/cluster.md` compares it with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rlattn.config import RunConfig
from rlattn.credit import needed
from rlattn.trainers.lora import adapted
from rlattn.trainers.model import captured_layers, out_of_reach
from rlattn.trainers.warmup import model_shape

GIB = 1 << 30
LIVE_PARAMETERS = 1_000_000_000
"""Gathered at a time under ZeRO-3: DeepSpeed's default of `stage3_max_live_parameters`."""
KEPT = ("weights", "gradients", "optimizer", "reference")
"""Parts that are there between updates, too."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per policy rank, engine and, with PPO, critic rank, by part; `parameters` is a count.

    `host` is what a policy rank keeps in its node's memory instead, with DeepSpeed's offload.
    """

    parameters: int
    policy: dict[str, float]
    engine: dict[str, float]
    critic: dict[str, float] | None = None
    host: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Bytes that a policy rank, and its critic, keep while engines sample."""
        parts = (self.policy, self.critic or {})
        return sum(part.get(name, 0.0) for part in parts for name in KEPT)

    def lines(self) -> list[str]:
        """Readable lines, in GiB."""
        out = [f"model: {self.parameters / 1e6:,.1f}M parameters"]
        named = {"policy rank": self.policy, "engine": self.engine, "critic rank": self.critic}
        for name, parts in (named | {"policy rank, in the node's memory": self.host}).items():
            if parts:
                detail = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items() if size)
                out.append(f"{name}: {sum(parts.values()) / GIB:.2f} GiB ({detail})")
        return out


def shape_of(config: RunConfig) -> PretrainedConfig:
    """The Hugging Face config of the run's model; the weights are not read."""
    if config.model.path is None:
        return model_shape(config.model.warmup, vocab_size=160)  # about as many words as the task needs
    try:
        return AutoConfig.from_pretrained(config.model.path)
    except (OSError, ValueError) as error:
        raise out_of_reach(config.model.path, error) from None


def estimate(config: RunConfig) -> MemoryEstimate:
    """Bytes per rank and engine for `config`. Activations are a rough upper bound; the rest is arithmetic."""
    shape = shape_of(config)
    captured_layers(config.signals, shape)  # refuses what the run would refuse
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        parameters = sum(p.numel() for p in model.parameters())
        if config.policy.lora:
            adapted(model, config.policy.lora, config.seed)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    policy, size = config.policy, 2 if config.model.dtype == "bfloat16" else 4
    zero = policy.deepspeed.get("zero_optimization", {})
    stage, ranks = zero.get("stage", 0), policy.ranks
    tokens, layers, width = policy.tokens_per_micro_batch, shape.num_hidden_layers, shape.hidden_size
    kept = 2 if policy.gradient_checkpointing else 16 + 3 * shape.intermediate_size / width
    head_dim = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    kv_token = 2 * layers * shape.num_key_value_heads * head_dim * size
    responses = responses_per_engine(config)
    traces_flow = "flow" in needed(config.credit.name)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    accumulated = policy.deepspeed.get("data_types", {}).get("grad_accum_dtype") in ("bf16", "fp16")
    sharded = {
        "weights": size * parameters / (ranks if stage == 3 else 1),
        "gradients": (2 if accumulated else 4) * learned / (ranks if stage >= 2 else 1),
        # fp32 master weights only where the weights are not fp32
        "optimizer": (12 if size == 2 else 8) * learned / (ranks if stage >= 1 else 1),
    }
    offloaded = {"gradients", "optimizer"} if _offloads(zero, "optimizer") else set()
    offloaded |= {"weights"} if _offloads(zero, "param") else set()
    host = {name: sharded.pop(name) for name in sorted(offloaded)}
    gathered = size * min(parameters, zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)) if stage == 3 else 0
    activations = tokens * width * layers * kept * size
    forward = {
        "activations": activations,
        "logits": 3 * 4 * policy.logits_chunk_tokens * shape.vocab_size,
        "flow map": tokens * longest * (1 if config.signals.flow.storage == "bfloat16" else 2) * traces_flow,
    }
    unreduced = size * learned / (ranks if stage >= 2 else 1)
    weights = sharded.get("weights", 0.0)
    return MemoryEstimate(
        parameters,
        {
            **sharded,
            "gathered": gathered,
            **forward,
            "step": max(0.0, unreduced - sum(forward.values())),
            "reference": weights if config.needs_reference and not policy.lora else 0,
        },
        {
            "weights": size * parameters / config.rollout.tensor_parallel_size,
            "KV cache": config.rollout.kv_cache_gib * GIB
            if config.rollout.kv_cache_gib
            else kv_token * responses * longest / config.rollout.tensor_parallel_size,
        },
        {**sharded, "gathered": gathered, "activations": activations} if config.algorithm.name == "ppo" else None,
        host,
    )


def responses_per_engine(config: RunConfig) -> float:
    """Completions of a batch that an engine samples."""
    return config.trainer.prompts_per_step * config.rollout.num_generations / config.rollout.num_engines


def _offloads(zero: dict[str, Any], what: str) -> bool:
    """DeepSpeed keeps it in the node's memory, or on its disk."""
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"
