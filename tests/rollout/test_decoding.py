"""Signals measured while real engines sample, against the policy's by the same weights."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from rollout_tiny import MAX_COMPLETION, MAX_PROMPT, make_model, run_config, save_model

from rlattn.problem import Problem
from rlattn.rollout.placement import plan
from rlattn.types import Decoded, Rollouts, Signals
from tests.make import make_rollouts, policy_of

PROBLEMS = [Problem(f"p{i}", f"{i}" * length, None) for i, length in enumerate([40, MAX_PROMPT - 1, 60, 1, 61])]
BAND = {"layers": None, "layer_range": "all", "waad_window": 3, "fai_low": 2, "fai_high": 9}
DECODE = BAND | {"source": "rollout", "forward": "decode", "heads": {"scope": "calibrated"}}
BLOCK = 32


def crowded() -> dict:
    """Room in the cache for so few tokens that requests are preempted."""
    model = make_model(tied=True, seed=0).config
    block = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 4 * BLOCK
    blocks = 2 * -(-(MAX_PROMPT + MAX_COMPLETION) // BLOCK) + 3
    return {"kv_cache_gib": blocks * block / 2**30, "engine_args": {"max_num_seqs": 6, "block_size": BLOCK}}


def read_rows(rollouts: Rollouts) -> Rollouts:
    """The batch without the tokens that sampling did not read."""
    assert rollouts.decoded is not None
    lengths = [
        int(n if own is None else p + len(own.columns["waad"]))
        for n, p, own in zip(rollouts.lengths, rollouts.prompt_lengths, rollouts.decoded, strict=True)
    ]
    assert all(0 <= n - length <= 1 for n, length in zip(rollouts.lengths.tolist(), lengths, strict=True))
    starts = rollouts.cu_seqlens[:-1].tolist()
    kept = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tokens = {"token_ids": rollouts.token_ids[kept], "sampled_logps": rollouts.sampled_logps[kept]}
    return replace(rollouts, **tokens, cu_seqlens=cu_seqlens, decoded=None)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{"num_engines": 2}, crowded()], ids=["two engines", "crowded"])
def test_decoded_signals_are_the_policys(rollout, local_ray, tokenizer, tmp_path: Path) -> None:
    from rlattn.rollout.pool import RolloutPool

    path = save_model(tmp_path / "model", tied=True, seed=0)
    config = run_config(rollout=rollout, signals=DECODE)
    pool = RolloutPool(config, path, tokenizer, plan=plan(config))
    try:
        first = pool.generate(PROBLEMS, 4, seed=0, step=0)
        assert first.decoded == [None] * 20
        groups = pool.score(first, None, ()).signals.groups.tolist()  # nobody knows them yet: a prefill
        rollouts = pool.generate(PROBLEMS, 4, seed=0, step=0, groups=groups, extra=("fai_all",))
        preempted = pool.metrics()["rollout/preemptions"]
        scores = pool.score(rollouts, groups, ("fai_all",))
        other = pool.score(rollouts, (-torch.tensor(groups)).tolist(), ("fai_all",))  # another step's groups
    finally:
        pool.shutdown()
    assert rollouts.token_ids.tolist() == first.token_ids.tolist()
    assert rollouts.decoded is not None
    measured = sum(own is not None for own in rollouts.decoded)
    assert 0 < measured < 20 if preempted else measured == 20
    assert bool(preempted) == ("kv_cache_gib" in rollout)

    read = read_rows(rollouts)
    with policy_of(run_config(signals=BAND | {"heads": {"scope": "calibrated"}}), path) as policy:
        expected = policy.score(read, groups).signals
        whole = policy.score(rollouts, groups).signals
    for name in ("waad", "fai"):
        own = getattr(scores.signals, name).split(rollouts.lengths.tolist())
        by_policy = getattr(expected, name).split(read.lengths.tolist())
        for mine, theirs in zip(own, by_policy, strict=True):
            torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=1e-4, atol=1e-5)
            assert (mine[len(theirs) :] == 0).all()
        assert getattr(scores.signals, name).abs().max() > 1e-3
    torch.testing.assert_close(scores.signals.sink_mass, expected.sink_mass, rtol=1e-4, atol=1e-5)
    assert (scores.signals.extra["fai_all"] - scores.signals.fai).abs().max() > 1e-3
    torch.testing.assert_close(other.signals.sink_mass, whole.sink_mass, rtol=1e-4, atol=1e-5)
    assert (other.signals.waad - scores.signals.waad).abs().max() > 1e-3


def test_a_request_that_is_resumed_is_not_whole() -> None:
    """Both model runners' ways: as a resumed request, and as a new one by a known name."""
    from rlattn.rollout.decoding import STEPS, SlotStore

    def step(new=(), cached=(), resumed=(), finished=()):
        names = [name for name, *_ in cached]
        rows = {"new_block_ids": [b for _, b, _ in cached], "num_computed_tokens": [n for _, _, n in cached]}
        return SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=[
                SimpleNamespace(req_id=n, block_ids=(b,), prompt_token_ids=[0] * 3, num_computed_tokens=0)
                for n, b in new
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=names, resumed_req_ids=set(resumed), **rows),
            num_scheduled_tokens={n: 3 for n, _ in new} | dict.fromkeys(names, 1),
        )

    store = SlotStore.__new__(SlotStore)
    store.tracks, store.steps = {}, deque(maxlen=STEPS)
    store.note(step(new=[("a", [4]), ("b", [5])]))
    store.note(step(cached=[("a", None, 3), ("b", ([7],), 3)]))
    assert [(t.blocks, t.prompt, t.whole) for t in store.tracks.values()] == [([4], 3, True), ([5, 7], 3, True)]
    assert store.rows() == {"a": 4, "b": 4}
    store.note(step(cached=[("a", ([8, 9],), 0)], resumed=["a"], new=[("b", [2])]))
    assert [(t.blocks, t.whole) for t in store.tracks.values()] == [([8, 9], False), ([2], False)]
    assert store.rows() == {"a": 1, "b": 3}
    store.note(step(finished=["a"]))
    assert list(store.tracks) == ["b"]


@pytest.mark.parametrize(
    ("signals", "named"),
    [
        ({"source": "policy"}, "source=policy"),
        ({"heads": {"scope": "batch"}}, "scope=batch"),
        ({"fai_high": None}, "fai_high=None"),
        ({"sink_tokens": 2}, "sink_tokens=2"),
    ],
)
def test_what_decoding_cannot_measure_is_refused(signals, named) -> None:
    with pytest.raises(ValidationError, match=named):
        run_config(signals=DECODE | signals)


@pytest.mark.parametrize("name", ["speculative_config", "kv_cache_dtype"])
def test_what_would_change_rows_or_keys_is_refused(name) -> None:
    with pytest.raises(ValidationError, match=name):
        run_config(signals=DECODE, rollout={"engine_args": {name: "any"}})


def test_what_was_decoded_stays_with_its_sequence() -> None:
    own = [Decoded({}, torch.zeros(1, 1), torch.zeros(1, 1)), None, Decoded({}, torch.ones(1, 1), torch.zeros(1, 1))]
    batch = make_rollouts([1, 1, 1], [2, 2, 2]).replace(decoded=own)
    assert batch.take([2, 1]).decoded == [own[2], None]
    assert Rollouts.cat([batch, batch.take([1])]).decoded == [*own, None]
    assert Rollouts.cat([batch, make_rollouts([1], [2])]).decoded is None


def test_without_groups_every_step_takes_what_sampling_measured_and_only_the_rest_is_scored() -> None:
    """`signals.heads.select: all`: nobody gives groups, and none are measured."""
    from rlattn.rollout.scoring import signals_of

    none, ones = torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 2)
    own = Decoded({"waad": torch.tensor([3.0, 4.0]), "fai": torch.tensor([0.5, 0.0])}, 2 * ones, none)
    batch = make_rollouts([1, 2], [3, 1]).replace(decoded=[own, None])
    asked = []

    def prefill(rest, groups):
        asked.append((rest.lengths.tolist(), groups))
        column = torch.tensor([0.0, 0.0, 9.0])
        return Signals(column, column, [7], None, None, 5 * ones, none)

    signals = signals_of(batch, [7], None, (), prefill)
    assert asked == [([3], [[0, 0]])]
    assert signals.waad.tolist() == [0, 3, 4, 0, 0, 0, 9]
    assert signals.fai.tolist() == [0, 0.5, 0, 0, 0, 0, 9]
    torch.testing.assert_close(signals.sink_mass, (2 + 5) / 3 * ones)  # two rows and one
