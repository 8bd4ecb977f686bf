"""Small things that tests of several rooms make."""

from contextlib import contextmanager
from typing import Any

import torch

from rlattn.config import RunConfig
from rlattn.problem import Problem
from rlattn.types import Rollouts


def tiny_qwen3(*, seed=0, **changes):
    """A Qwen3 of random weights, small enough for any test; `changes` go to its config."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**(shape | changes)))


def fetch_weights(references):
    """Name -> tensor of the buckets that `Policy.weights` hands out."""
    import ray

    return {name: tensor for ref in references for name, tensor in ray.get(ref, timeout=60).items()}


def make_rollouts(prompt_lengths, response_lengths, *, vocab=50, seed=0, group_size=1):
    """Rollouts of random tokens; sequence b is in group b // group_size."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = torch.tensor(prompt_lengths), torch.tensor(response_lengths)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (prompts + responses).cumsum(0)])
    count, total = len(prompt_lengths), int(cu_seqlens[-1])
    return Rollouts(
        token_ids=torch.randint(0, vocab, (total,), generator=generator),
        cu_seqlens=cu_seqlens,
        prompt_lengths=prompts,
        sampled_logps=torch.zeros(total),
        group_ids=torch.arange(count) // group_size,
        truncated=torch.zeros(count, dtype=torch.bool),
        policy_version=torch.zeros(count, dtype=torch.int64),
        rewards=torch.full((count,), float("nan")),
        texts=[""] * count,
        problems=[Problem(str(i), "", None) for i in range(count)],
        reward_parts={},
    )


@contextmanager
def seats(settings):
    """Plan and placement group of `settings` on the running Ray; what sits there ends with the block."""
    from ray.util.placement_group import remove_placement_group

    from rlattn.rollout.cluster import reserve
    from rlattn.rollout.placement import plan

    layout = plan(settings)
    group = reserve(settings, layout)
    try:
        yield layout, group
    finally:
        remove_placement_group(group)


@contextmanager
def policy_of(settings, model_path, reference_path=None, checkpoint=None):
    """A policy on the running Ray, loaded as `Policy.load` does it; its actors end with the block."""
    from rlattn.trainers.policy import Policy

    with seats(settings) as (layout, group):
        policy = Policy(settings, layout, group)
        policy.load(model_path, reference_path or model_path, checkpoint)
        yield policy


def policy_config(ranks: int = 1, stage: int = 0, **sections: dict[str, Any]) -> RunConfig:
    """Ranks on CPUs for batches of 3 x 4 short sequences, cut into several micro-batches; `sections` add to that."""
    policy = {
        "ranks": ranks,
        "gpus_per_rank": 0,
        "tokens_per_micro_batch": 64,
        "logits_chunk_tokens": 16,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "timeout_s": 240,
    }
    return RunConfig.model_validate(
        {
            "model": {"dtype": "float32"},
            "rollout": {"max_prompt_length": 8, "max_completion_length": 24, "num_generations": 4},
            "trainer": {"prompts_per_step": 3, "steps": 4},
            **sections,
            "policy": policy | sections.get("policy", {}),
        }
    )


TINY_RUN = [
    "task.options.format_reward=0.5",  # a barely trained model is seldom right, but its groups must differ
    "task.options.train_size=2000",
    "task.options.test_size=16",
    "model.warmup.hidden_size=64",
    "model.warmup.intermediate_size=128",
    "model.warmup.num_layers=3",
    "model.warmup.num_heads=4",
    "model.warmup.num_kv_heads=2",
    "model.warmup.steps=120",
    "rollout.num_generations=4",
    "rollout.max_completion_length=48",
    "rollout.kv_cache_gib=0.05",
    "policy.ranks=2",
    "policy.cpus_per_rank=1",
    "policy.deepspeed={zero_optimization: {stage: 3}}",
    "trainer.prompts_per_step=6",
    "trainer.eval_steps=2",
    "trainer.save_steps=1",
    "trainer.log_completions=2",
]
"""Overrides that make the quickstart a matter of seconds: ZeRO-3 over two ranks, a checkpoint a step."""
