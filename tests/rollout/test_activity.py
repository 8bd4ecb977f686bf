"""What an engine says of its queue, its prefix cache and its preemptions; and checksums of what it is sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rollout_tiny import MAX_COMPLETION, MAX_PROMPT, make_model, run_config, save_model

from rlattn.problem import Problem
from rlattn.rollout.checksums import check, checksums
from rlattn.rollout.cluster import ActorError

BLOCK = 32


@pytest.fixture(scope="module")
def crowded(tmp_path_factory, local_ray, tokenizer) -> Iterator[object]:
    """An engine that samples six requests at a time, with room in its cache for fewer."""
    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool

    model = make_model(tied=True, seed=0).config
    block = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 4 * BLOCK
    blocks = 2 * -(-(MAX_PROMPT + MAX_COMPLETION) // BLOCK) + 3
    config = run_config(
        rollout={
            "kv_cache_gib": blocks * block / 2**30,
            "check_weights": True,
            "engine_args": {"max_num_seqs": 6, "block_size": BLOCK},
        }
    )
    path = save_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)
    made = RolloutPool(config, path, tokenizer, plan=plan(config))
    yield made
    made.shutdown()


@pytest.mark.slow
class TestCrowded:
    def test_queue_preemptions_and_cache_hits_are_counted(self, crowded) -> None:
        said: list[str] = []
        crowded.fleet.watch = said.append
        problems = [Problem(f"p{i}", f"{i}" * (MAX_PROMPT - 1), None) for i in range(5)]
        rollouts = crowded.generate(problems, 4, seed=0, step=0)
        metrics = crowded.metrics()
        assert 0 < metrics["rollout/queue_depth"] <= 20
        assert metrics["rollout/preemptions"] >= 1
        whole = (MAX_PROMPT - 1) // BLOCK * BLOCK  # of a prompt, what others of its group can share
        assert 0 < metrics["rollout/prefix_cache_hit_rate"] <= whole / (MAX_PROMPT - 1)
        assert said[-1].startswith("20 of 20 completions; engine 0 0 running, 0 waiting")
        assert len(rollouts) == 20

    def test_a_batch_starts_its_counts_anew(self, crowded) -> None:
        crowded.generate([Problem("short", "1", None)], 2, seed=0, step=1)
        metrics = crowded.metrics()
        assert (metrics["rollout/preemptions"], metrics["rollout/prefix_cache_hit_rate"]) == (0, 0)

    def test_weights_that_differ_from_what_was_sent_are_refused_by_name(self, crowded, monkeypatch) -> None:
        import ray

        state = make_model(tied=True, seed=0).state_dict()
        crowded.load_weights(lambda: [ray.put(state)], 1)  # what is right passes

        def other(tensors):
            return checksums(tensors) | {"model.norm.weight": "0"}

        monkeypatch.setattr("rlattn.rollout.pool.checksums", other)
        with pytest.raises(ActorError, match=r"\(bucket 0\): engine 0 (.|\n)*1 tensors are not .* model\.norm\.weight"):
            crowded.load_weights(lambda: [ray.put(state)], 2)


def test_checksums_see_bytes_shapes_and_names() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    expected = checksums(tensors)
    check("me", expected, checksums({name: tensor.clone() for name, tensor in tensors.items()}))
    check("me", expected, checksums(tensors | {"a": tensors["a"].t().contiguous().t()}))  # its strides do not matter
    for wrong in (
        {"a": tensors["a"] + 1},
        {"a": tensors["a"].reshape(3, 2)},
        {"b": torch.ones(4)},
        {"c": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match=f"me: 1 tensors are not what was sent: {next(iter(wrong))}"):
            check("me", expected, checksums(tensors | wrong))
    with pytest.raises(ValueError, match="1 tensors are not what was sent: b"):
        check("me", expected, checksums({"a": tensors["a"]}))
