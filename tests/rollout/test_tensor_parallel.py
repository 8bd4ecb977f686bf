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

DECODE = {"source": "rollout", "forward": "decode", "heads": {"scope": "calibrated"}, "fai_low": 1, "fai_high": 9}
GROUPS = torch.tensor([[-1, 1, 0, -1], [0, -1, 1, 1]], dtype=torch.int8)
REQUESTS = [(i, Request([3 + i, 4, 5, 6], seed=i, temperature=1.0)) for i in range(20)]
HOW = {"patience_s": 60.0, "top_p": 1.0, "max_tokens": 20}


@pytest.fixture
def start(local_ray, tmp_path):
    """Starts an engine of some width; gives a way to call it, and its process."""
    import ray

    config = run_config(signals=DECODE)
    path = save_model(tmp_path, tied=False, seed=0)
    env = engine_env(config) | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # two workers would want a NUMA node each
    actors = []

    def started(width):
        backend = {"distributed_executor_backend": "uni" if width == 1 else "mp"}
        settings = engine_args(config, path, layers=[0, 1]) | {"tensor_parallel_size": width} | backend
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


def completions(call):
    finished = {}
    new = REQUESTS
    while len(finished) < len(REQUESTS):
        finished |= call("advance", 1, new, **HOW, groups=GROUPS, extra=("fai_all",)).finished
        new = []
    return [finished[number] for number, _ in REQUESTS]


def assert_same(one, two):
    """Tokens, and signals measured on the way, each worker those of its own heads."""
    assert [c.token_ids.tolist() for c in one] == [c.token_ids.tolist() for c in two]
    assert torch.cat([c.decoded.columns["fai"] for c in one]).max() > 1e-3
    for a, b in zip(one, two, strict=True):
        assert a.decoded.columns.keys() == b.decoded.columns.keys() == {"waad", "fai", "fai_all"}
        for name, column in a.decoded.columns.items():
            torch.testing.assert_close(b.decoded.columns[name], column, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.decoded.sink_mass, a.decoded.sink_mass, rtol=1e-4, atol=1e-5)


def test_two_workers_sample_and_measure_what_one_does_and_an_engine_that_loses_one_is_lost(start) -> None:
    one, _ = start(1)
    two, process = start(2)
    assert_same(completions(one), completions(two))
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
