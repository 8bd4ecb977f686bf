"""Estimators, GAE, the value loss and the overlong penalty against closed forms."""

import pytest
import torch

from rlattn.config import AlgorithmConfig
from rlattn.estimators import ESTIMATORS, estimate
from rlattn.estimators.gae import gae, whiten
from rlattn.estimators.grpo import group_relative
from rlattn.losses.value import value_loss
from rlattn.overlong import overlong_penalty
from tests.make import make_rollouts

REWARDS = torch.tensor([1.0, 0.0, 0.5, 3.0, 1.0])
GROUPS = torch.tensor([7, 7, 7, 2, 2])


def advantages(estimator, scale_rewards):
    return estimate(REWARDS, GROUPS, AlgorithmConfig(estimator=estimator, scale_rewards=scale_rewards))[0]


def test_rloo_takes_the_mean_of_the_others():
    expected = [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 3 - 1.0, 1 - 3.0]
    torch.testing.assert_close(advantages("rloo", "none"), torch.tensor(expected))


def test_rloo_of_a_group_of_one_is_zero():
    alone = estimate(torch.tensor([2.0]), torch.tensor([0]), AlgorithmConfig(estimator="rloo", scale_rewards="none"))[0]
    assert alone.tolist() == [0]


def test_reinforce_plus_plus_normalises_over_the_batch():
    expected = (REWARDS - REWARDS.mean()) / (REWARDS.std() + 1e-4)
    torch.testing.assert_close(advantages("reinforce_plus_plus", "batch"), expected)
    centred = torch.tensor([0.5, -0.5, 0.0, 1.0, -1.0])
    expected = centred / (centred.std() + 1e-4)
    torch.testing.assert_close(advantages("reinforce_plus_plus_baseline", "batch"), expected)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_every_estimator_says_what_the_rewards_are(name):
    metrics = estimate(REWARDS, GROUPS, AlgorithmConfig(estimator=name))[1]
    if name != "reinforce_plus_plus_baseline":
        assert metrics == group_relative(REWARDS, GROUPS, "group")[1]
    assert metrics["reward"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="finite"):
        estimate(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), AlgorithmConfig(estimator=name))


def test_gae_by_hand():
    rollouts = make_rollouts([2, 1], [3, 1])  # [T] = 7: responses at 2..4 and 6
    values = torch.tensor([9.0, 9.0, 0.5, 0.2, 0.1, 9.0, 0.4])
    rewards = torch.tensor([0.0, 0.0, 0.0, -0.1, 1.0, 0.0, 2.0])
    own, returns = gae(rollouts, rewards, values, gamma=0.9, lam=0.8)
    last = 1.0 - 0.1
    middle = -0.1 + 0.9 * 0.1 - 0.2 + 0.72 * last
    first = 0.9 * 0.2 - 0.5 + 0.72 * middle
    torch.testing.assert_close(own, torch.tensor([0, 0, first, middle, last, 0, 1.6]))
    torch.testing.assert_close(returns, torch.tensor([0, 0, first + 0.5, middle + 0.2, 1.0, 0, 2.0]))


def test_gae_with_lambda_one_is_return_minus_value_and_with_zero_one_step():
    rollouts = make_rollouts([3, 1, 2], [7, 1, 4])
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(18, generator=generator), torch.rand(18, generator=generator)
    mask = rollouts.response_mask
    long, returns = gae(rollouts, rewards, values, gamma=1.0, lam=1.0)
    short, _ = gae(rollouts, rewards, values, gamma=0.9, lam=0.0)
    for start, end in ((3, 10), (11, 12), (14, 18)):
        left = rewards[start:end].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(long[start:end], left - values[start:end])
        torch.testing.assert_close(returns[start:end], left)
        following = torch.cat([values[start + 1 : end], torch.zeros(1)])
        torch.testing.assert_close(short[start:end], rewards[start:end] + 0.9 * following - values[start:end])
    assert not long[~mask].any()
    with pytest.raises(ValueError, match="shapes must be equal"):
        gae(rollouts, rewards[:5], values, gamma=1.0, lam=1.0)


def test_whitening():
    mask = torch.tensor([True, False, True, True])
    white = whiten(torch.tensor([1.0, 100.0, 2.0, 3.0]), mask)
    torch.testing.assert_close(white, torch.tensor([-1.0, 0.0, 0.0, 1.0]))


def test_value_loss_by_hand():
    values = torch.tensor([0.5, 1.5, 0.9]).requires_grad_()
    old, returns = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    loss, clipped = value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.32, 0.32, 0.605]))
    assert clipped.tolist() == [True, True, False]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.0, -1.1]))
    free, clipped = value_loss(values, old, returns, None)
    torch.testing.assert_close(free.detach(), torch.tensor([0.125, 0.125, 0.605]))
    assert not clipped.any()


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])
