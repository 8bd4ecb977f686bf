"""Weights straight from the policy's GPU into engines. The part marked `gpu` runs the real thing, on one GPU or two."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch
from rollout_tiny import run_config

from rlattn.config import RunConfig
from rlattn.rollout.placement import plan
from rlattn.rollout.transfer import backend, direct

SHARED = {"policy": {"gpus_per_rank": 0.5}, "ray": {"placement": "colocate"}}


def backends(config: RunConfig, **changes: bool) -> list[str | None]:
    layout = plan(config, **changes)
    return [backend(config, layout, seat) for seat in layout.engines]


def test_an_engine_reads_from_its_gpu_or_is_sent_weights() -> None:
    apart = run_config(policy={"gpus_per_rank": 1}, rollout={"num_engines": 2})
    assert backends(apart) == ["nccl", "nccl"]
    beside = run_config(
        policy={"gpus_per_rank": 0.5, "ranks": 2}, ray={"placement": "colocate"}, rollout={"num_engines": 3}
    )
    assert backends(beside) == ["ipc", "ipc", "nccl"]


def test_weights_go_by_the_object_store_where_nothing_else_can_carry_them() -> None:
    correction = {"vllm_importance_sampling_correction": True}
    one = {"policy": {"gpus_per_rank": 1}}
    assert backends(run_config(policy={"gpus_per_rank": 0})) == [None]
    assert backends(run_config(**one, rollout={"steps_ahead": 1}, algorithm=correction)) == [None]
    assert backends(run_config(**one, rollout={"weight_transfer": "object_store"})) == [None]
    assert backends(run_config(policy={"gpus_per_rank": 1, "lora": {"sync": "adapter"}})) == [None]
    assert backends(run_config(**one), policy=False) == [None]  # evaluation: nobody has other weights
    assert direct(run_config(policy={"gpus_per_rank": 1, "lora": {"sync": "merged"}}))


def gpus() -> int:
    return torch.cuda.device_count()


@pytest.fixture(scope="module")
def ray_on_gpus(tmp_path_factory):
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.gpu
@pytest.mark.skipif(gpus() < 1, reason="needs a GPU")
@pytest.mark.parametrize("lora", [None, {"sync": "merged", "r": 8}], ids=["whole", "merged adapters"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("placement", ["colocate", "separate"])
def test_engines_hold_what_the_policy_learned(ray_on_gpus, tmp_path: Path, placement, stage, lora) -> None:
    """Checksums of all that arrives; then an engine that was killed is given the same, and samples the same."""
    import ray
    from rollout_tiny import save_model
    from transformers import AutoTokenizer

    from rlattn.problem import Problem
    from rlattn.rollout.cluster import reserve
    from rlattn.rollout.pool import RolloutPool
    from rlattn.trainers.policy import Policy

    if placement == "separate" and gpus() < 2:
        pytest.skip("needs two GPUs")
    colocated = placement == "colocate"
    config = run_config(
        model={"dtype": "bfloat16"},
        policy={
            "gpus_per_rank": 0.5 if colocated else 1,
            "learning_rate": 1e-2,
            "lora": lora,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        },
        rollout={
            "check_weights": True,
            "sleep": colocated,
            "enforce_eager": True,
            "kv_cache_gib": None,
            "gpu_memory_utilization": 0.2,
            "num_generations": 4,
        },
        ray={"placement": placement},
        algorithm={"vllm_importance_sampling_correction": True},
    )
    model = save_model(tmp_path, tied=True, seed=0)
    layout = plan(config)
    group = reserve(config, layout)
    policy = Policy(config, layout, group)
    policy.load(model, model, None)
    pool = RolloutPool(config, model, AutoTokenizer.from_pretrained(model), plan=layout, group=group)
    problems, steps = [Problem(str(i), f"{i} + {i}", None) for i in range(3)], count()

    def sample():
        return pool.generate(problems, 4, seed=0, step=next(steps))

    def apart(rollouts) -> float:
        if colocated:
            pool.sleep()
        rows = rollouts.response_mask
        return (policy.score(rollouts).logps - rollouts.sampled_logps)[rows].abs().mean().item()

    try:
        before = sample()
        assert apart(before) < 0.02
        for version in (1, 2):
            scores = policy.score(before)
            advantages = torch.randn(len(before.token_ids), generator=torch.Generator().manual_seed(version))
            policy.update(before, scores, advantages, version)
            assert (policy.score(before).logps - before.sampled_logps)[before.response_mask].abs().mean() > 0.05
            pool.take_weights(policy, version)
            after = sample()
            assert set(after.policy_version.tolist()) == {version}
            assert apart(after) < 0.02
            pool.take_weights(policy, version)
        ray.kill(pool.fleet.members[0].actor)
        rebuilt = sample()
        assert pool.fleet.lost == 1
        assert set(rebuilt.policy_version.tolist()) == {2}
        assert apart(rebuilt) < 0.02
    finally:
        pool.shutdown()
        ray.util.remove_placement_group(group)
