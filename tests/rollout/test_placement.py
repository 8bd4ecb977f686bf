"""Placement arithmetic, engine arguments and seeds: nothing is started."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rollout_tiny import MAX_COMPLETION, MAX_PROMPT, run_config

from rlattn.config import ConfigError
from rlattn.rollout.engine_args import OWNED_ENGINE_ARGS, check_engine_args, engine_args, engine_env
from rlattn.rollout.placement import describe, plan


def test_cpu_plan_reserves_one_bundle_an_actor() -> None:
    made = plan(run_config(policy={"gpus_per_rank": 0, "ranks": 2, "cpus_per_rank": 3}, rollout={"num_engines": 2}))
    assert made.bundles == [{"CPU": 3}, {"CPU": 3}, {"CPU": 1}, {"CPU": 1}]
    assert (made.cpus, made.gpus) == (8, 0)


def test_gpu_plan_gives_an_engine_its_tensor_parallel_gpus() -> None:
    config = run_config(policy={"gpus_per_rank": 1, "ranks": 2}, rollout={"num_engines": 2, "tensor_parallel_size": 2})
    assert plan(config).bundles == [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 2}] * 2
    assert plan(config).gpus == 6


@pytest.mark.parametrize(
    ("ranks", "engines", "bundles"),
    [
        (2, 2, [{"CPU": 2, "GPU": 1}] * 2),
        (2, 1, [{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 0.75}]),
        (1, 3, [{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]),
    ],
)
def test_fraction_shares_a_gpu_rank_by_rank(ranks: int, engines: int, bundles: list[dict[str, float]]) -> None:
    config = run_config(
        policy={"gpus_per_rank": 0.75, "ranks": ranks}, rollout={"num_engines": engines}, ray={"placement": "colocate"}
    )
    assert plan(config).bundles == bundles


def test_description_names_every_actor_once() -> None:
    config = run_config(
        policy={"gpus_per_rank": 0.5, "ranks": 2}, rollout={"num_engines": 2}, ray={"placement": "colocate"}
    )
    assert describe(plan(config)) == [
        "placement: 2 bundles, 4 CPUs, 2 GPUs",
        "  bundle 0: policy rank 0 (1 CPU, 0.5 GPU) + engine 0 (1 CPU, 0.5 GPU)",
        "  bundle 1: policy rank 1 (1 CPU, 0.5 GPU) + engine 1 (1 CPU, 0.5 GPU)",
    ]


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_wide_engine_needs_whole_gpus(gpus: float) -> None:
    ray = {"placement": "colocate"}
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        plan(run_config(policy={"gpus_per_rank": gpus}, rollout={"tensor_parallel_size": 2}, ray=ray))


def test_placement_and_shares_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"reserve 0\.5 of a GPU .* ray\.placement to colocate"):
        plan(run_config(policy={"gpus_per_rank": 0.5}))
    with pytest.raises(ConfigError, match=r"leaves an engine nothing of a GPU .* lower policy\.gpus_per_rank"):
        plan(run_config(policy={"gpus_per_rank": 1}, ray={"placement": "colocate"}))


def test_colocated_on_cpus_shares_the_bundle_of_its_rank() -> None:
    config = run_config(
        policy={"gpus_per_rank": 0, "ranks": 2}, rollout={"num_engines": 3}, ray={"placement": "colocate"}
    )
    assert plan(config).bundles == [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]
    assert plan(config).gpus == 0


def test_labels_reach_the_bundles() -> None:
    labels = {"policy_labels": {"accelerator": "H100"}, "rollout_labels": {"pool": "sampling"}}
    apart = plan(run_config(policy={"gpus_per_rank": 0}, ray=labels))
    assert apart.selectors == [{"accelerator": "H100"}, {"pool": "sampling"}]
    together = plan(run_config(policy={"gpus_per_rank": 0}, ray=labels | {"placement": "colocate"}))
    assert together.selectors == [{"accelerator": "H100", "pool": "sampling"}]
    with pytest.raises(ValueError, match="policy_labels and rollout_labels differ in 'zone': 'a' and 'b'"):
        run_config(ray={"placement": "colocate", "policy_labels": {"zone": "a"}, "rollout_labels": {"zone": "b"}})


@pytest.mark.parametrize("key", [*OWNED_ENGINE_ARGS, "enable_chunked_prefill"])
def test_owned_engine_args_are_refused_with_their_owner(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is set by"):
        check_engine_args(run_config(rollout={"engine_args": {"max_num_seqs": 4, key: None}}))


@pytest.mark.parametrize("gpus", [0, 1])
def test_an_engine_argument_is_the_users_or_refused(gpus: int) -> None:
    for key in engine_args(run_config(policy={"gpus_per_rank": gpus}), "model"):
        mine = run_config(policy={"gpus_per_rank": gpus}, rollout={"engine_args": {key: "mine"}})
        if key in {"max_num_seqs", "max_num_batched_tokens", "block_size"}:
            assert engine_args(mine, "model")[key] == "mine"
        else:
            with pytest.raises(ConfigError, match=key):
                engine_args(mine, "model")


def test_engine_args_follow_the_config() -> None:
    config = run_config(rollout={"engine_args": {"max_num_seqs": 4}})
    args = engine_args(config, "somewhere")
    assert args["max_model_len"] == MAX_PROMPT + MAX_COMPLETION
    assert (args["model"], args["dtype"], args["max_num_seqs"]) == ("somewhere", "float32", 4)
    assert args["kv_cache_memory_bytes"] == 64 << 20
    gpu = engine_args(run_config(policy={"gpus_per_rank": 1}, rollout={"kv_cache_gib": None}), "somewhere")
    assert gpu["gpu_memory_utilization"] == config.rollout.gpu_memory_utilization
    assert "kv_cache_memory_bytes" not in gpu


def test_compilation_is_off_only_for_an_eager_cpu_engine() -> None:
    assert "TORCH_COMPILE_DISABLE" in engine_env(run_config())
    assert "TORCH_COMPILE_DISABLE" not in engine_env(run_config(rollout={"enforce_eager": False}))
    assert "TORCH_COMPILE_DISABLE" not in engine_env(run_config(policy={"gpus_per_rank": 1}))


def test_checks_at_the_door_import_neither_ray_nor_vllm() -> None:
    code = (
        "import sys, rlattn.rollout.engine_args, rlattn.rollout.placement\n"
        "print(*{'ray', 'vllm', 'deepspeed', 'trl', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("share", "own", "engines", "bundles"),
    [
        (0, None, 1, [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]),
        (0.25, 0.25, 2, [{"CPU": 3, "GPU": 1}] * 2),  # rank, critic and engine on one GPU
        (0.5, None, 1, [{"CPU": 2, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 1}]),
        (1, None, 1, [{"CPU": 1, "GPU": 1}] * 4 + [{"CPU": 1, "GPU": 1}]),
    ],
)
def test_a_critic_joins_its_rank_where_both_fit(
    share: float, own: float | None, engines: int, bundles: list[dict[str, float]]
) -> None:
    config = run_config(
        policy={"gpus_per_rank": share, "ranks": 2},
        rollout={"num_engines": engines},
        algorithm={"name": "ppo"},
        ppo={"critic_gpus_per_rank": own},
        ray={"placement": "colocate" if own else "separate"},
    )
    assert plan(config).bundles == bundles
    assert [seat.name for seat in plan(config).critic] == ["critic rank 0", "critic rank 1"]
    assert "critic rank 0" in "\n".join(describe(plan(config)))
