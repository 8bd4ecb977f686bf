"""Reward functions in real Ray processes: weights, failures, time-outs, deaths, and answers of the wrong length."""

from pathlib import Path

import pytest
import ray

from rlattn.config import RewardsConfig
from rlattn.reward_functions import RewardError
from rlattn.trainers.reward_pool import RewardPool
from tests.make import make_rollouts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

FILE = Path(__file__).parent / "hostile_rewards.py"
TEXTS = ["good", "fine, long", "bad", "good"]


def scored(*functions, workers=2):
    rollouts = make_rollouts([2] * 4, [3] * 4, group_size=2).replace(texts=TEXTS)
    config = RewardsConfig.model_validate({"workers": workers, "functions": list(functions)})
    pool = RewardPool(config)
    try:
        return pool.score(rollouts)
    finally:
        for worker in pool.workers:
            ray.kill(worker)


def function(name, **options):
    return {"function": f"{FILE}:{name}"} | options


def test_several_functions_are_weighted_apart():
    parts, metrics = scored(function("length", weight=0.5, options={"scale": 2}), function("later", weight=3))
    assert parts["length"].tolist() == [4, 10, 3, 4]
    assert parts["later"].tolist() == [3, 0, 0, 3]
    assert metrics == {"rewards/length/failures": 0, "rewards/later/failures": 0}


def test_a_failure_costs_only_its_own_completion():
    parts, metrics = scored(
        function("raising", default=-1), function("dying", weight=2), function("infinite", default=0.5)
    )
    assert parts["raising"].tolist() == [1, 1, -1, 1]
    assert parts["dying"].tolist() == [2, 2, 0, 2]
    assert parts["infinite"].tolist() == [1, 1, 0.5, 1]
    assert metrics == {f"rewards/{name}/failures": 1 for name in ("raising", "dying", "infinite")}


def test_a_function_that_hangs_is_ended():
    parts, metrics = scored(function("hanging", timeout_s=3, default=-2), workers=1)
    assert parts["hanging"].tolist() == [1, 1, -2, 1]
    assert metrics == {"rewards/hanging/failures": 1}


def test_the_wrong_number_of_values_stops_the_run():
    with pytest.raises(RewardError, match="'short' returned 1 values for 2 completions"):
        scored(function("short"))
