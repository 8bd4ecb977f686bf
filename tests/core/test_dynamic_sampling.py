"""Batches of groups that teach something: which groups are kept, in which order, and how many draws it takes."""

import pytest
import torch

from rlattn.dynamic_sampling import fill
from rlattn.types import Rollouts
from tests.make import make_rollouts

EQUAL, DIFFERING = [1.0, 1.0], [0.0, 1.0]


def drawn(index, *groups):
    """Scored rollouts of two completions a group; texts say draw and sequence."""
    count = 2 * len(groups)
    batch = make_rollouts([3] * count, list(range(1, count + 1)), seed=index, group_size=2)
    rewards = torch.tensor([reward for group in groups for reward in group])
    return batch.replace(
        rewards=rewards, reward_parts={"accuracy": rewards}, texts=[f"{index}.{b}" for b in range(count)]
    )


def source(*batches):
    calls = []

    def draw(index):
        calls.append(index)
        return drawn(index, *batches[index])

    return draw, calls


def test_a_full_first_draw_is_kept_as_it_is():
    draw, calls = source([DIFFERING, DIFFERING, DIFFERING])
    batch, metrics = fill(draw, 3, max_draws=4)
    whole = drawn(0, DIFFERING, DIFFERING, DIFFERING)
    assert calls == [0]
    assert torch.equal(batch.token_ids, whole.token_ids)
    assert torch.equal(batch.cu_seqlens, whole.cu_seqlens)
    assert batch.texts == whole.texts
    assert metrics == {"filter_groups/draws": 1, "filter_groups/kept": 1}


def test_equal_groups_give_their_place_to_the_next_draw():
    draw, calls = source([DIFFERING, EQUAL, DIFFERING], [EQUAL, DIFFERING, DIFFERING])
    batch, metrics = fill(draw, 3, max_draws=4)
    assert calls == [0, 1]
    assert batch.texts == ["0.0", "0.1", "0.4", "0.5", "1.2", "1.3"]
    assert batch.rewards.tolist() == [0, 1] * 3
    assert batch.reward_parts["accuracy"].tolist() == [0, 1] * 3
    assert batch.group_ids.unique(return_inverse=True)[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert metrics == {"filter_groups/draws": 2, "filter_groups/kept": 4 / 6}


def test_after_the_last_draw_equal_groups_fill_the_batch():
    draw, calls = source([EQUAL, EQUAL], [EQUAL, DIFFERING])
    batch, metrics = fill(draw, 2, max_draws=2)
    assert calls == [0, 1]
    assert batch.texts == ["0.0", "0.1", "1.2", "1.3"]
    assert metrics == {"filter_groups/draws": 2, "filter_groups/kept": 1 / 4}


@pytest.mark.parametrize("spans", [True, False])
def test_taking_and_joining_give_back_what_was_there(spans):
    batch = drawn(0, DIFFERING, EQUAL, DIFFERING)
    if spans:
        batch = batch.replace(answer_spans=torch.arange(12).view(6, 2))
    again = Rollouts.cat([batch.take([0, 1]), batch.take([2, 3, 4, 5])])
    for name in ("token_ids", "cu_seqlens", "sampled_logps", "prompt_lengths", "truncated", "rewards"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name
    assert again.texts == batch.texts
    assert [problem.id for problem in again.problems] == [problem.id for problem in batch.problems]
    assert (again.answer_spans is not None) == spans
    if spans:
        assert torch.equal(again.answer_spans, batch.answer_spans)
