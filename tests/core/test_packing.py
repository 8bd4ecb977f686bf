import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlattn import packing
from rlattn.types import token_indices
from tests.make import make_rollouts


@settings(deadline=None)
@given(st.lists(st.integers(2, 50), min_size=4, max_size=40), st.integers(1, 4), st.integers(50, 200))
def test_plan_covers_every_sequence_once_within_budget(lengths, ranks, budget):
    layout = packing.plan(lengths, ranks, budget)
    assert sorted(i for rank in layout for micro in rank for i in micro) == list(range(len(lengths)))
    assert len({len(rank) for rank in layout}) == 1  # ZeRO-3 ranks must run equally many forwards
    assert all(sum(lengths[i] for i in micro) <= budget for rank in layout for micro in rank)
    assert all(rank[0] for rank in layout)


def test_plan_balances():
    loads = [sum([100, 90, 10, 5, 5][i] for i in rank[0]) for rank in packing.plan([100, 90, 10, 5, 5], 2, 1000)]
    assert max(loads) - min(loads) <= 10


def test_ranks_run_like_loads_together():
    lengths = [60, 50, 40, 30, 25]
    loads = [[sum(lengths[i] for i in micro) for micro in rank] for rank in packing.plan(lengths, 2, 60)]
    assert loads == [[60, 50], [55, 40]]


def test_plan_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="a sequence of 11 tokens exceeds"):
        packing.plan([11, 3], 1, 10)
    with pytest.raises(ValueError, match="1 sequences cannot be shared by 2 ranks"):
        packing.plan([3], 2, 10)


def test_a_rank_with_nothing_left_scores_a_prompt_and_adds_nothing():
    rollouts = make_rollouts(prompt_lengths=[2, 2, 2, 2], response_lengths=[17, 30, 30, 30])
    layout = packing.plan(rollouts.lengths.tolist(), 3, 50)
    assert [] in [micro for rank in layout for micro in rank]
    shards = packing.cut(rollouts, layout, 8, column=torch.ones(len(rollouts.token_ids)))
    fillers = [m for rank, s in zip(layout, shards, strict=True) for i, m in zip(rank, s, strict=True) if not i]
    assert all(len(micro.token_ids) == 19 and not len(micro.response_indices) for micro in fillers)
    back = packing.restore(rollouts.cu_seqlens, layout, [[m.columns["column"] for m in s] for s in shards])
    assert back.sum() == len(rollouts.token_ids)


def test_cut_and_restore_are_inverse():
    rollouts = make_rollouts(prompt_lengths=[3, 2, 4, 1, 2], response_lengths=[5, 7, 1, 9, 4])
    layout = packing.plan(rollouts.lengths.tolist(), 2, 16)
    column = torch.randn(len(rollouts.token_ids))
    shards = packing.cut(rollouts, layout, 4, column=column)
    back = packing.restore(rollouts.cu_seqlens, layout, [[micro.columns["column"] for micro in s] for s in shards])
    torch.testing.assert_close(back, column, rtol=0, atol=0)
    for micros, shard in zip(layout, shards, strict=True):
        for indices, micro in zip(micros, shard, strict=True):
            where = token_indices(rollouts.cu_seqlens, indices)
            assert torch.equal(micro.response_indices, rollouts.response_mask[where].nonzero().squeeze(1))
            assert micro.position_ids[micro.cu_seqlens[:-1]].tolist() == [0] * len(indices)
    for micros in zip(*shards, strict=True):  # every rank computes log-probs in equally many chunks
        assert len({micro.chunks for micro in micros}) == 1


def test_one_micro_batch_a_rank_shares_a_batch_evenly():
    lengths = [7, 1, 5, 5, 2, 4]
    shares = [share for (share,) in packing.plan(lengths, 2, sum(lengths))]
    assert sorted(place for share in shares for place in share) == list(range(6))
    assert [sum(lengths[place] for place in share) for share in shares] == [12, 12]
