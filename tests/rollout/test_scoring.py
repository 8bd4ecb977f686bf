"""Signals that real engines measure, against the policy's by the same weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from rollout_tiny import run_config, save_model

from rlattn.problem import Problem
from rlattn.rollout.placement import plan
from tests.make import policy_of

PROBLEMS = [Problem(f"p{i}", prompt, None) for i, prompt in enumerate(["what is 3+4?", "a", "make 24 from 3, 8, 1, 1"])]


@pytest.mark.slow
def test_signals_from_engines_are_the_policys(local_ray, tokenizer, tmp_path: Path) -> None:
    """Two engines, one of them killed before it is asked, against the policy's scoring forward by the same weights."""
    from rlattn.rollout.pool import RolloutPool

    path = save_model(tmp_path / "model", tied=True, seed=0)
    sections = {"rollout": run_config().rollout.model_dump() | {"num_engines": 2}, "trainer": {"prompts_per_step": 3}}
    signals = {"layers": None, "layer_range": "all"}
    config = run_config(**sections, signals=signals | {"source": "rollout"})
    pool = RolloutPool(config, path, tokenizer, plan=plan(config))
    try:
        rollouts = pool.generate(PROBLEMS, 4, seed=0, step=0)
        first = pool.score(rollouts, None, ("fai_all",))
        os.kill(pool.fleet.members[0].info.place.pid, signal.SIGKILL)
        again = pool.score(rollouts, first.signals.groups.tolist(), ("fai_all",))
    finally:
        pool.shutdown()
    own = run_config(**sections, signals=signals)
    with policy_of(own, path) as policy:
        expected = policy.score(rollouts)
    mask = rollouts.response_mask
    assert torch.equal(first.logps, rollouts.sampled_logps)
    torch.testing.assert_close(first.logps[mask], expected.logps[mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(first.signals.groups, expected.signals.groups)
    assert first.signals.layers == expected.signals.layers == [0, 1]
    for name in ("waad", "fai", "span", "entropy", "sink_mass"):
        actual = getattr(first.signals, name)
        torch.testing.assert_close(actual, getattr(expected.signals, name), rtol=1e-4, atol=1e-4)
    assert (first.signals.extra["fai_all"] - first.signals.fai).abs().max() > 1e-3
    for name in ("waad", "fai", "sink_mass"):
        torch.testing.assert_close(getattr(again.signals, name), getattr(first.signals, name), rtol=1e-5, atol=1e-6)
    assert again.signals.span is None
