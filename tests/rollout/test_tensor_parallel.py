"""An engine that is spread over two worker processes."""

from __future__ import annotations

import psutil
import pytest
import torch
from rollout_tiny import run_config, save_model

from rlattn.rollout.cluster import ActorLost, collect
from rlattn.rollout.engine import Engine, EngineInfo, Request
from rlattn.rollout.engine_args import engine_args, engine_env
from tests.nodes import wait_for

pytestmark = pytest.mark.slow

REQUESTS = [(i, Request([3 + i, 4, 5, 6], seed=i, temperature=1.0)) for i in range(20)]
HOW = {"patience_s": 60.0, "top_p": 1.0, "max_tokens": 20}


@pytest.fixture
def start(local_ray, tmp_path):
    """Starts an engine of some width; gives a way to call it, and its process."""
    import ray

    config = run_config()
    path = save_model(tmp_path, tied=False, seed=0)
    env = engine_env(config) | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # two workers would want a NUMA node each
    actors = []

    def started(width, **signals):
        backend = {"distributed_executor_backend": "uni" if width == 1 else "mp"}
        args = engine_args(run_config(signals=signals), path, layers=[0, 1])
        settings = args | {"tensor_parallel_size": width} | backend
        actor = ray.remote(Engine).options(num_cpus=1, runtime_env={"env_vars": env}).remote(settings)
        actors.append(actor)

        def call(name, *args, **kwargs):
            return collect({"engine": getattr(actor, name).remote(*args, **kwargs)}, phase=name, timeout_s=240)[0]

        info: EngineInfo = call("load")
        return call, psutil.Process(info.place.pid)

    yield started
    for actor in actors:
        ray.kill(actor)


def workers(engine):
    return [
        child for child in engine.children(recursive=True) if "Worker_TP" in child.name() + "".join(child.cmdline())
    ]


def tokens(call):
    finished = {}
    new = REQUESTS
    while len(finished) < len(REQUESTS):
        finished |= call("advance", 1, new, **HOW).finished
        new = []
    return {number: completion.token_ids.tolist() for number, completion in finished.items()}


def test_two_workers_sample_what_one_samples_and_an_engine_that_loses_one_is_lost(start) -> None:
    one, _ = start(1)
    two, process = start(2)
    assert tokens(one) == tokens(two)
    both = workers(process)
    assert len(both) == 2
    both[1].kill()
    with pytest.raises(ActorLost, match="advance: engine died"):  # and is rebuilt: not an error, which ends a run
        two("advance", 2, REQUESTS, **HOW)
    wait_for(lambda: not any(worker.is_running() for worker in both), "the other worker to end", 30)


def test_workers_end_with_their_engine(start) -> None:
    _, process = start(2)
    both = workers(process)
    process.kill()
    wait_for(lambda: not any(worker.is_running() for worker in both), "the workers to end", 30)


def test_workers_measure_their_own_heads_while_they_sample(start):
    decode = {"source": "rollout", "forward": "decode", "heads": {"scope": "calibrated"}, "fai_low": 1, "fai_high": 9}
    groups = torch.tensor([[-1, 1, 0, -1], [0, -1, 1, 1]], dtype=torch.int8)
    found = []
    for width in (1, 2):
        call, _ = start(width, **decode)
        done = call("advance", 1, REQUESTS, **HOW, groups=groups, extra=("fai_all",)).finished
        found.append([done[number].decoded for number, _ in REQUESTS])
    assert torch.cat([one.columns["fai"] for one in found[0]]).max() > 1e-3
    for one, two in zip(*found, strict=True):
        assert one.columns.keys() == two.columns.keys() == {"waad", "fai", "fai_all"}
        for name, column in one.columns.items():
            torch.testing.assert_close(two.columns[name], column, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two.sink_mass, one.sink_mass, rtol=1e-4, atol=1e-5)
