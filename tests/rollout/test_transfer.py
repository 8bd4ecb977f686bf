"""Weights straight from the policy's GPU into engines. The part marked `gpu` runs the real thing, on one GPU or two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_tiny import run_config

from rlattn.config import RunConfig
from rlattn.rollout.placement import plan
from rlattn.rollout.transfer import backend, direct


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
    ahead = {"rollout": {"steps_ahead": 1}, "algorithm": correction}
    assert backends(run_config(policy={"gpus_per_rank": 0.5}, ray={"placement": "colocate"}, **ahead)) == [None]
    assert backends(run_config(**one, **ahead)) == ["nccl"]  # rank 0 keeps what it sent
    assert backends(run_config(**one, rollout={"weight_transfer": "object_store"})) == [None]
    assert backends(run_config(policy={"gpus_per_rank": 1, "lora": {"sync": "adapter"}})) == [None]
    assert backends(run_config(**one), policy=False) == [None]  # evaluation: nobody has other weights
    assert direct(run_config(policy={"gpus_per_rank": 1, "lora": {"sync": "merged"}}))


def gpus() -> int:
    return torch.cuda.device_count()


@pytest.fixture(scope="module")
def ray_on_gpus():
    """Runs from another folder than the source tree, which Ray would put on its workers' path."""
    import ray

    if gpus() < 1:
        pytest.skip("needs a GPU")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@contextmanager
def running(
    tmp_path: Path, placement: str, stage: int = 1, lora: dict[str, Any] | None = None, ahead: int = 0
) -> Iterator[Any]:
    """A policy, a pool with one engine, and `apart`: how far their log-probs of sampled rollouts lie apart."""
    import ray
    from rollout_tiny import save_model
    from transformers import AutoTokenizer

    from rlattn.problem import Problem
    from rlattn.rollout.cluster import reserve
    from rlattn.rollout.pool import RolloutPool
    from rlattn.trainers.policy import Policy

    colocated = placement == "colocate"
    if gpus() < (1 if colocated else 2):
        pytest.skip("needs another GPU")
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
            "steps_ahead": ahead,
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

    awake = True

    def sample(step: int | None = None) -> Any:
        nonlocal awake
        awake = True
        return pool.generate(problems, 4, seed=0, step=next(steps) if step is None else step)

    def apart(rollouts: Any) -> float:
        nonlocal awake
        if colocated and awake:
            pool.sleep()
        awake = False
        rows = rollouts.response_mask
        return (policy.score(rollouts).logps - rollouts.sampled_logps)[rows].abs().mean().item()

    def learn(rollouts: Any, step: int) -> None:
        advantages = torch.randn(len(rollouts.token_ids), generator=torch.Generator().manual_seed(step))
        policy.update(rollouts, policy.score(rollouts), advantages, step)
        assert apart(rollouts) > 0.05

    try:
        yield policy, pool, sample, apart, learn
    finally:
        pool.shutdown()
        ray.util.remove_placement_group(group)


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [None, {"sync": "merged", "r": 8}], ids=["whole", "merged adapters"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("placement", ["colocate", "separate"])
def test_engines_hold_what_the_policy_learned(ray_on_gpus, tmp_path, placement, stage, lora) -> None:
    """Checksums of all that arrives, and equal log-probs; an engine that is rebuilt is given the same."""
    import ray

    with running(tmp_path, placement, stage, lora) as (policy, pool, sample, apart, learn):
        rollouts = sample()
        assert apart(rollouts) < 0.02
        for version in (1, 2):
            learn(rollouts, version)
            pool.take_weights(policy, version)
            rollouts = sample()
            assert set(rollouts.policy_version.tolist()) == {version}
            assert apart(rollouts) < 0.02
        pool.take_weights(policy, 2)
        ray.kill(pool.fleet.members[0].actor)
        rebuilt = sample()
        assert pool.fleet.lost == 1
        assert set(rebuilt.policy_version.tolist()) == {2}
        assert apart(rebuilt) < 0.02


@pytest.mark.gpu
def test_an_engine_that_dies_in_a_broadcast_is_rebuilt_and_given_it_again(ray_on_gpus, tmp_path) -> None:
    import ray

    with running(tmp_path, "separate") as (policy, pool, sample, apart, learn):

        class Kills:
            """The policy, which kills the engine as it is about to send."""

            next_weights, meet, done = policy.next_weights, policy.meet, False

            def broadcast(self, receivers: list[Any], timeout_s: float) -> bool:
                if not self.done:
                    self.done = True
                    ray.kill(pool.fleet.members[0].actor)
                return policy.broadcast(receivers, timeout_s)

        rollouts = sample()
        learn(rollouts, 1)
        pool.take_weights(Kills(), 1)
        assert pool.fleet.lost == 1
        rebuilt = sample()
        assert set(rebuilt.policy_version.tolist()) == {1}
        assert apart(rebuilt) < 0.02


@pytest.mark.gpu
def test_a_step_ahead_a_rebuilt_engine_is_given_what_the_others_have(ray_on_gpus, tmp_path) -> None:
    """And not what the policy has learned since."""
    import ray

    with running(tmp_path, "separate", ahead=1) as (policy, pool, sample, _, learn):
        learn(sample(), 1)
        pool.take_weights(policy, 1)
        before = sample(99)
        learn(before, 2)
        ray.kill(pool.fleet.members[0].actor)
        rebuilt = sample(99)
        assert pool.fleet.lost == 1
        assert set(rebuilt.policy_version.tolist()) == {1}
        assert torch.equal(rebuilt.token_ids, before.token_ids)
        assert (rebuilt.sampled_logps - before.sampled_logps).abs().max() < 0.05
