import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlattn.estimators.grpo import group_relative


def trl(rewards, size, scale):
    """TRL's lines (`_generate_and_score_completions`) for contiguous groups of one size, with TRL's own `nanstd`."""
    from trl.trainer.utils import nanstd

    grouped = rewards.view(-1, size)
    centred = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(size)
    std = nanstd(rewards).expand_as(rewards) if scale == "batch" else nanstd(grouped, dim=1).repeat_interleave(size)
    zero = torch.isclose(std, torch.zeros_like(std)).float().mean().item()
    return (centred if scale == "none" else centred / (std + 1e-4)), nanstd(rewards).item(), zero


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [2, 4])
def test_equals_trl(scale, size):
    rewards = torch.rand(4 * size, generator=torch.Generator().manual_seed(0))
    rewards[:size] = 1.0
    expected, std, zero = trl(rewards, size, scale)
    advantages, metrics = group_relative(rewards, torch.arange(4).repeat_interleave(size), scale)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=1e-5)
    expected_metrics = {"reward": rewards.mean().item(), "reward_std": std, "frac_reward_zero_std": zero}
    assert metrics == pytest.approx(expected_metrics)
    assert zero == (0 if scale == "batch" else 0.25)


def test_by_hand_with_ragged_scattered_groups():
    """Group 7: rewards 0, 1, 2 (mean 1, std 1); group 3: 1, 1; group 5: alone."""
    rewards = torch.tensor([0.0, 1.0, 4.0, 1.0, 1.0, 2.0])
    groups = torch.tensor([7, 3, 5, 7, 3, 7])
    advantages, metrics = group_relative(rewards, groups, "group")
    assert advantages.tolist() == pytest.approx([-1 / 1.0001, 0, 0, 0, 0, 1 / 1.0001])
    assert metrics["frac_reward_zero_std"] == 0.5
    assert advantages.dtype == torch.float32


@given(st.floats(-10, 10, width=32), st.integers(1, 9), st.sampled_from(["group", "batch", "none"]))
@settings(max_examples=50, deadline=None)
def test_equal_rewards_give_exact_zeros(reward, size, scale):
    advantages, metrics = group_relative(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64), scale)
    assert not advantages.any()
    assert metrics["frac_reward_zero_std"] == 1


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 3)), min_size=1, max_size=20), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_does_not_matter(pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    rewards, groups = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    before = group_relative(rewards, groups, "group")[0]
    after = group_relative(rewards[order], groups[order], "group")[0]
    torch.testing.assert_close(after, before[order])


@pytest.mark.parametrize(
    ("rewards", "groups", "scale", "message"),
    [
        ([1.0], [0, 0], "group", r"rewards \(1,\)"),
        ([[1.0, 0.0]], [[0, 0]], "group", r"rewards \(1, 2\)"),
        ([], [], "group", r"rewards \(0,\)"),
        ([1.0, float("nan")], [0, 0], "group", "reward of sequence 1 is nan"),
        ([float("inf"), 0.0], [0, 0], "batch", "reward of sequence 0 is inf"),
        ([1.0, 0.0], [0, 0], "std", "group, batch or none"),
    ],
)
def test_bad_input(rewards, groups, scale, message):
    with pytest.raises(ValueError, match=message):
        group_relative(torch.tensor(rewards), torch.tensor(groups), scale)
