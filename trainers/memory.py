"""A memory estimate for `--dry-run`: what the weights, optimizer, activations and KV cache of a config will take.

Bytes per parameter follow the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3): weights, gradients, and
AdamW's fp32 master weights and two moments, each divided by the ranks from the stage that shards it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rlattn.config import RunConfig
from rlattn.credit import needed
from rlattn.trainers.lora import adapted
from rlattn.trainers.model import captured_layers, out_of_reach
from rlattn.trainers.warmup import model_shape

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per policy rank, engine and, with PPO, critic rank, by part; `parameters` is a count."""

    parameters: int
    policy: dict[str, float]
    engine: dict[str, float]
    critic: dict[str, float] | None = None

    def lines(self) -> list[str]:
        """Readable lines, in GiB."""
        out = [f"model: {self.parameters / 1e6:,.1f}M parameters"]
        named = {"policy rank": self.policy, "engine": self.engine, "critic rank": self.critic}
        for name, parts in named.items():
            if parts is None:
                continue
            detail = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
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
    stage = policy.deepspeed.get("zero_optimization", {}).get("stage", 0)
    ranks = policy.ranks
    gradient = 2 if policy.deepspeed.get("data_types", {}).get("grad_accum_dtype") in ("bf16", "fp16") else 4
    optimizer = (12 if size == 2 else 8) * learned  # fp32 master weights only where the weights are not fp32
    tokens, layers, width = policy.tokens_per_micro_batch, shape.num_hidden_layers, shape.hidden_size
    kept = 2 if policy.gradient_checkpointing else 16 + 3 * shape.intermediate_size / width
    head_dim = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    kv_token = 2 * layers * shape.num_key_value_heads * head_dim * size
    responses = config.trainer.prompts_per_step * config.rollout.num_generations / config.rollout.num_engines
    traces_flow = "flow" in needed(config.credit.name)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    trained = {
        "weights": size * parameters / (ranks if stage == 3 else 1),
        "gradients": gradient * learned / (ranks if stage >= 2 else 1),
        "optimizer": optimizer / (ranks if stage >= 1 else 1),
        "activations": tokens * width * layers * kept * size,
    }
    return MemoryEstimate(
        parameters,
        {
            **trained,
            "logits": 3 * 4 * policy.logits_chunk_tokens * shape.vocab_size,
            "flow map": tokens * longest * (1 if config.signals.flow.storage == "bfloat16" else 2) * traces_flow,
            "reference": trained["weights"] if config.needs_reference and not policy.lora else 0,
        },
        {
            "weights": size * parameters / config.rollout.tensor_parallel_size,
            "KV cache": config.rollout.kv_cache_gib * GIB
            if config.rollout.kv_cache_gib
            else kv_token * responses * longest,
        },
        trained if config.algorithm.name == "ppo" else None,
    )
