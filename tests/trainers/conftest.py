"""The tiny model that the policy tests train, and a local Ray to train it on."""

import pytest

from tests.make import policy_config, tiny_qwen3


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(num_hidden_layers=6).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def local_ray():
    """Ray on this machine with room for four ranks and what ends before them."""
    import ray

    from rlattn.rollout.cluster import start_ray
    from rlattn.rollout.placement import plan

    settings = policy_config(ranks=4, ray={"num_cpus": 16})
    start_ray(settings, plan(settings))
    yield
    ray.shutdown()
