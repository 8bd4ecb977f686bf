"""A checkpoint of two ranks, resumed on one: the same moments, and the step that two would have taken."""

import shutil
from contextlib import contextmanager

import pytest
import torch

from rlattn.config import ConfigError
from rlattn.trainers.checkpoint import Checkpoints
from rlattn.trainers.universal import check_sharding, loadable, sharding
from tests.make import fetch_weights, make_rollouts, policy_of
from tests.trainers.test_policy import config


@contextmanager
def started(settings, model_path, checkpoint=None, keep=None):
    with loadable(checkpoint, settings.policy) as source:
        if keep:
            shutil.copytree(source, keep)
        with policy_of(settings, str(checkpoint / "model") if checkpoint else model_path, model_path, source) as policy:
            yield policy


def step(policy, number):
    rollouts = make_rollouts([5] * 12, range(4, 16), group_size=4, seed=number)
    advantages = torch.linspace(-1, 1, len(rollouts.token_ids))
    policy.update(rollouts, policy.score(rollouts), advantages, step=number)


def moment(file):
    """DeepSpeed writes a moment as a tensor under ZeRO stage 3, and with notes around it under the other stages."""
    loaded = torch.load(file, weights_only=False)
    return loaded["param"] if isinstance(loaded, dict) else loaded


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("stage", "later"), [(1, 2), (3, 3)])
def test_two_ranks_go_on_as_one(tmp_path, model_path, stage, later):
    two, one = config(2, stage), config(1, later)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9)
    with started(two, model_path) as policy:
        for number in range(2):
            step(policy, number)

        def write(folder):
            policy.save(folder)
            policy.save(folder / "critic")  # where PPO's lies

        checkpoint = checkpoints.save(2, {"sharding": sharding(two.policy)}, write)
        step(policy, 2)
        expected = fetch_weights(policy.weights())
    assert checkpoints.verified(checkpoint, "") == checkpoint
    assert sorted(path.name for path in (checkpoint / "rng").iterdir()) == ["rank-0.pt", "rank-1.pt"]

    with started(one, model_path, checkpoint, keep=tmp_path / "was") as policy:
        again = checkpoints.save(3, {"sharding": sharding(one.policy)}, policy.save)
        step(policy, 2)
        weights = fetch_weights(policy.weights())
    assert not list(checkpoints.root.glob(".universal-*"))
    assert (tmp_path / "was" / "critic" / "optimizer" / "zero").is_dir()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
    with loadable(again, two.policy) as now:
        files = [path.relative_to(now) for path in now.rglob("exp_avg*.pt")]
        assert len(files) == 2 * len(expected)
        for file in files:
            assert torch.equal(moment(now / file), moment(tmp_path / "was" / file)), file


def test_a_stage_of_another_kind_is_refused():
    check_sharding({"ranks": 2, "stage": 1}, config(4, 2).policy)
    with pytest.raises(ConfigError, match=r"policy\.deepspeed.*written under ZeRO stage 3.*stages 1 and 2"):
        check_sharding({"ranks": 2, "stage": 3}, config(2, 1).policy)
