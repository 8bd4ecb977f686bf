"""Statistics out of a real vLLM on the CPU, against the same weights in transformers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from rollout_tiny import make_model, run_config, save_model

from rlattn.kernels import AttentionStatistics, Capture, StatisticsOptions, register
from rlattn.rollout.cluster import ActorError, collect
from tests.rollout.scorer import LAYERS, Scorer

pytestmark = pytest.mark.slow
LENGTHS = [1, 2, 33, 80, 17, 64, 65, 5, 40, 31, 32, 80]


SETTINGS: dict[str, dict[str, Any]] = {
    "whole, no prefix cache": {"enable_prefix_caching": False, "enable_chunked_prefill": False},
    # 33 tokens in chunks of 32: a last token alone
    "chunked, cached": {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 32},
    "heads on two workers": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def scorer(request, local_ray, tmp_path_factory):
    import ray

    from rlattn.rollout.engine_args import engine_args, engine_env

    config = run_config()
    path = save_model(tmp_path_factory.mktemp("model"), tied=False, seed=0)
    settings = engine_args(config, path) | {"max_num_seqs": 8} | SETTINGS[request.param]
    env = engine_env(config) | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # two workers would want a NUMA node each
    actor = ray.remote(Scorer).options(num_cpus=1, runtime_env={"env_vars": env}).remote(settings)
    yield lambda name, *args, **kwargs: collect(
        {"scorer": getattr(actor, name).remote(*args, **kwargs)}, phase=name, timeout_s=240
    )[0]
    ray.kill(actor)


def batch() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    rows[-1][:50] = rows[3][:50]  # a shared prefix
    return rows


def expected(
    token_ids: list[list[int]], starts: list[int], options: StatisticsOptions, seed: int = 0
) -> dict[int, AttentionStatistics]:
    """By the policy's way: transformers with rlattn's attention, one packed forward."""
    model = make_model(tied=False, seed=seed)
    model.set_attn_implementation(register())
    lengths = torch.tensor([len(ids) for ids in token_ids])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    capture = Capture(LAYERS, options, (cu_seqlens[:-1] + torch.tensor(starts)).tolist())
    with torch.no_grad():
        model.model(
            input_ids=torch.cat([torch.tensor(ids) for ids in token_ids])[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            cu_seqlens=cu_seqlens,
            capture=capture,
            use_cache=False,
        )
    return capture.statistics


@pytest.mark.parametrize("options", [StatisticsOptions(), StatisticsOptions(5, 3, None, 1)], ids=["paper", "others"])
def test_statistics_are_those_of_the_same_weights_in_transformers(scorer, options) -> None:
    token_ids = batch()
    starts = [length // 3 for length in LENGTHS]
    scorer("generate", token_ids)  # fills the prefix cache, where there is one
    measured = scorer("measure", token_ids, response_starts=starts, options=options)
    assert [sorted(layers) for layers in measured] == [LAYERS] * len(LENGTHS)
    truth = expected(token_ids, starts, options)
    assert_equal(measured, truth)
    assert (truth[0].waad - truth[1].waad).abs().max() > 0.1  # layers differ, so a mistaken one would be seen


def assert_equal(measured: list[dict[int, AttentionStatistics]], truth: dict[int, AttentionStatistics]) -> None:
    for layer in LAYERS:
        for part in fields(AttentionStatistics):
            whole = torch.cat([getattr(layers[layer], part.name) for layers in measured], -1)
            torch.testing.assert_close(whole, getattr(truth[layer], part.name), rtol=1e-4, atol=1e-4, msg=part.name)


def test_statistics_follow_new_weights(scorer) -> None:
    token_ids, starts = batch(), [0] * len(LENGTHS)
    scorer("generate", token_ids)
    for seed in (1, 0):
        scorer("load_weights", make_model(tied=False, seed=seed).state_dict())
        measured = scorer("measure", token_ids, response_starts=starts)
        assert_equal(measured, expected(token_ids, starts, StatisticsOptions(), seed))


def test_generation_is_the_same_before_and_after(scorer) -> None:
    before = scorer("generate", batch())
    scorer("measure", batch())
    assert scorer("generate", batch()) == before


def test_what_cannot_be_measured_is_refused_by_name(scorer) -> None:
    for args, options, message in (
        (([[3] * 88],), {}, r"sequence 0 has 88 tokens; accepted are 1 to 87"),
        (([[3], []],), {}, r"sequence 1 has 0 tokens"),
        (([[3, 4]],), {"response_starts": [3]}, r"response_starts\[0\]=3 must lie in 0\.\.2"),
        (([[3, 4]],), {"response_starts": [0, 0]}, r"2 response_starts for 1 sequences"),
    ):
        with pytest.raises(ActorError, match=message):
            scorer("measure", *args, **options)


def test_layers_that_are_not_there_are_named() -> None:
    from rlattn.rollout.capture import attention_layers

    with pytest.raises(ValueError, match=r"layers \[3\] have no attention to listen to; those that have: \[\]"):
        attention_layers({}, [3])
