"""Real engines on the CPU: what they sample, what they say about it, and what new weights change."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import pytest
import torch
from rollout_tiny import MAX_COMPLETION, MAX_PROMPT, make_model, run_config, save_model

from rlattn.problem import Problem
from rlattn.rollout.cluster import ActorError
from rlattn.types import Rollouts

PROBLEMS = [
    Problem(f"p{i}", prompt, None) for i, prompt in enumerate(["what is 3+4?", "a", "make 24 from 3, 8, 1 and 1"])
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pool(request, tmp_path_factory, local_ray, tokenizer) -> Iterator[object]:
    """Tied embeddings in one engine, untied ones in two; `pool.tied` says which."""
    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool

    config = run_config(rollout={"num_engines": 1 if request.param else 2})
    path = save_model(tmp_path_factory.mktemp("model"), tied=request.param, seed=0)
    made = RolloutPool(config, path, tokenizer, plan=plan(config))
    made.tied = request.param
    yield made
    made.shutdown()


def hf_logps(model: torch.nn.Module, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """[T] log-probs of every token by a plain forward of each sequence; 0 on prompts."""
    expected = torch.zeros(len(rollouts.token_ids))
    bounds = rollouts.cu_seqlens.tolist()
    for start, end, prompt in zip(bounds[:-1], bounds[1:], rollouts.prompt_lengths.tolist(), strict=True):
        ids = rollouts.token_ids[start:end]
        with torch.no_grad():
            logps = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
        expected[start + prompt : end] = logps[prompt - 1 : -1].gather(1, ids[prompt:, None])[:, 0]
    return expected


def load(pool, model: torch.nn.Module, version: int) -> None:
    import ray

    state = list(model.state_dict().items())
    halves = (dict(state[: len(state) // 2]), dict(state[len(state) // 2 :]))
    pool.load_weights(lambda: (ray.put(half) for half in halves), version)


def max_error(pool, model: torch.nn.Module, temperature: float = 1.0) -> float:
    rollouts = pool.generate(PROBLEMS, 4, seed=0, step=0, temperature=temperature)
    return (rollouts.sampled_logps - hf_logps(model, rollouts, temperature)).abs().max().item()


def sampled_until_all_are_back(pool) -> set[int]:
    """Samples while a lost engine is rebuilt; the versions of the weights that did."""
    deadline, versions = time.monotonic() + 60, set()
    while not versions or pool.fleet.members[-1].info is None:
        assert time.monotonic() < deadline, "the engine is not back"
        versions |= set(pool.generate(PROBLEMS, 2, seed=0, step=0).policy_version.tolist())
    return versions


@pytest.mark.slow
class TestPool:
    def test_batch_is_packed_and_labelled(self, pool, tokenizer) -> None:
        rollouts = pool.generate(PROBLEMS, 4, seed=0, step=0)
        assert len(rollouts) == 12
        assert rollouts.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert [p.id for p in rollouts.problems] == ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4
        assert rollouts.prompt_lengths.tolist() == [12] * 4 + [1] * 4 + [26] * 4
        assert rollouts.cu_seqlens[-1] == len(rollouts.token_ids) == len(rollouts.sampled_logps)
        assert rollouts.rewards.isnan().all()
        assert set(rollouts.policy_version.tolist()) == {pool.version}
        assert (rollouts.sampled_logps[~rollouts.response_mask] == 0).all()
        assert (rollouts.sampled_logps[rollouts.response_mask] < 0).all()
        for b, (start, end) in enumerate(zip(rollouts.cu_seqlens[:-1], rollouts.cu_seqlens[1:], strict=True)):
            ids, prompt = rollouts.token_ids[start:end], rollouts.prompt_lengths[b]
            assert tokenizer.decode(ids[:prompt]) == rollouts.problems[b].prompt
            assert tokenizer.decode(ids[prompt:], skip_special_tokens=True) == rollouts.texts[b]
            # Truncated means the limit came first; otherwise the end token, 0, is kept and is last.
            assert rollouts.truncated[b] == (ids[-1] != 0)
            assert not rollouts.truncated[b] or end - start - prompt == MAX_COMPLETION
            assert 0 not in ids[prompt:-1]

    def test_a_stream_gives_every_problem_once_and_whatever_else_is_asked_the_same(self, pool) -> None:
        from rlattn.rollout.pool import Ask

        def texts(problems: list[Problem]) -> dict[str, list[str]]:
            finished = list(pool.stream([Ask(problem, 3, 1.0) for problem in problems], seed=4))
            assert len(finished) == len(problems)
            return {problems[index].id: [text for text, _ in completions] for index, completions in finished}

        together = texts(PROBLEMS)
        assert set(together) == {problem.id for problem in PROBLEMS}
        assert all(len(set(of_one)) == 3 for of_one in together.values())
        assert texts(PROBLEMS[1:2])["p1"] == together["p1"]
        asks = [Ask(PROBLEMS[0], 2, 0.0), Ask(PROBLEMS[0], 3, 1.0)]  # greedy and sampled, side by side
        answers = {index: [text for text, _ in completions] for index, completions in pool.stream(asks, seed=4)}
        assert answers[0][0] == answers[0][1]
        assert answers[1] == together["p0"]

    def test_same_seed_same_tokens_and_other_seed_or_step_others(self, pool) -> None:
        first, second = (pool.generate(PROBLEMS, 4, seed=1, step=2) for _ in range(2))
        assert torch.equal(first.token_ids, second.token_ids)
        assert torch.equal(first.sampled_logps, second.sampled_logps)
        for seed, step in ((2, 2), (1, 3)):
            assert pool.generate(PROBLEMS, 4, seed=seed, step=step).texts != first.texts
        assert len(set(first.texts)) == len(first.texts)  # no two requests share a stream

    def test_greedy_ignores_seeds(self, pool) -> None:
        greedy = pool.generate(PROBLEMS, 2, seed=1, step=0, temperature=0)
        assert greedy.texts == pool.generate(PROBLEMS, 2, seed=5, step=9, temperature=0).texts
        assert greedy.texts[0] == greedy.texts[1]

    def test_max_tokens_truncates(self, pool) -> None:
        rollouts = pool.generate(PROBLEMS, 2, seed=0, step=0, max_tokens=3)
        assert rollouts.response_lengths.max() == 3
        with pytest.raises(ValueError, match=f"max_tokens={MAX_COMPLETION + 1} must lie in 1..{MAX_COMPLETION}"):
            pool.generate(PROBLEMS, 2, seed=0, step=0, max_tokens=MAX_COMPLETION + 1)

    def test_the_shortest_groups_are_kept_and_equal_those_of_a_whole_batch(self, pool) -> None:
        count, keep = 200, 5
        problems = [Problem(f"q{i}", f"what is {i}+{i * 7 % 5}?", None) for i in range(count)]
        undecided = make_model(tied=pool.tied, seed=0)
        for weight in {undecided.lm_head.weight, undecided.model.embed_tokens.weight}:
            weight.data *= 0.1  # nearly uniform next tokens, the end among them
        load(pool, undecided, version=3)
        how = {"seed": 5, "step": 2}
        whole = pool.generate(problems, 2, **how)
        lengths = (whole.lengths - whole.prompt_lengths).reshape(count, 2).amax(1).tolist()
        expected = sorted(sorted(range(count), key=lambda group: (lengths[group], group))[:keep])
        assert len(set(lengths)) > 3  # there is something to choose
        kept = pool.generate(problems, 2, keep=keep, **how)
        assert [problem.id for problem in kept.problems[::2]] == [f"q{group}" for group in expected]
        chosen = whole.take([2 * group + i for group in expected for i in range(2)])
        assert torch.equal(kept.token_ids, chosen.token_ids)
        assert kept.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        again = pool.generate(problems, 2, **how)
        assert torch.equal(again.token_ids, whole.token_ids)  # nothing of the cut requests is left
        load(pool, make_model(tied=pool.tied, seed=0), version=0)

    def test_long_prompt_is_named(self, pool) -> None:
        long = Problem("too-long", "x" * (MAX_PROMPT + 1), None)
        with pytest.raises(
            ValueError, match=rf"'too-long' has {MAX_PROMPT + 1} tokens; accepted are 1 to {MAX_PROMPT}"
        ):
            pool.check_prompts([*PROBLEMS, long])
        with pytest.raises(ValueError, match="'empty' has 0 tokens"):
            pool.generate([Problem("empty", "", None)], 2, seed=0, step=0)
        exact = Problem("fits", "x" * MAX_PROMPT, None)
        assert pool.generate([exact], 2, seed=0, step=0).prompt_lengths.tolist() == [MAX_PROMPT] * 2

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logps_are_the_models_at_the_sampling_temperature(self, pool, temperature: float) -> None:
        assert max_error(pool, make_model(tied=pool.tied, seed=0), temperature) < 1e-4

    def test_new_weights_replace_the_old_ones_and_their_cache(self, pool) -> None:
        old, new = (make_model(tied=pool.tied, seed=seed) for seed in (0, 1))
        assert max_error(pool, new) > 0.1  # the check below can fail
        load(pool, new, version=7)
        assert max_error(pool, new) < 1e-4
        assert pool.generate(PROBLEMS, 2, seed=0, step=0).policy_version.tolist() == [7] * 6
        metrics, engines = pool.metrics(), len(pool.fleet.members)
        size = sum(tensor.nbytes for tensor in new.state_dict().values()) / 2**20
        assert metrics["rollout/sent_mib"] == pytest.approx(engines * size)
        assert metrics["perf/sent_mib_per_second"] > 0
        assert {f"perf/tokens_per_second/engine {i}" for i in range(engines)} <= metrics.keys()
        assert metrics["rollout/engines_lost"] == 0
        load(pool, old, version=8)
        assert max_error(pool, old) < 1e-4

    def test_who_sleeps_samples_nothing_until_new_weights_come(self, pool) -> None:
        pool.sleep()
        with pytest.raises(ActorError, match="asleep until new weights"):
            pool.generate(PROBLEMS, 2, seed=0, step=0)
        new = make_model(tied=pool.tied, seed=1)
        load(pool, new, version=7)
        assert max_error(pool, new) < 1e-4
        pool.sleep()
        os.kill(pool.fleet.members[-1].info.place.pid, signal.SIGKILL)  # asleep or not, it is rebuilt
        load(pool, make_model(tied=pool.tied, seed=0), version=0)
        assert sampled_until_all_are_back(pool) == {0}
        assert max_error(pool, make_model(tied=pool.tied, seed=0)) < 1e-4

    def test_missing_weights_are_named_and_the_engine_refuses_to_sample(self, pool) -> None:
        import ray

        state = make_model(tied=pool.tied, seed=0).state_dict()
        lost = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
        # Every engine refuses; the one that answers first is named.
        with pytest.raises(ActorError, match=r"loading weights 9 \(finish\): engine [01] (.|\n)*model\.norm\.weight"):
            pool.load_weights(lambda: [ray.put(lost)], 9)
        with pytest.raises(ActorError, match="half-loaded"):
            pool.generate(PROBLEMS, 2, seed=0, step=0)
        load(pool, make_model(tied=pool.tied, seed=0), version=0)
        assert max_error(pool, make_model(tied=pool.tied, seed=0)) < 1e-4

    def test_number_of_engines_changes_no_token(self, pool) -> None:
        from rlattn.rollout.pool import RolloutPool

        if pool.tied:
            pytest.skip("needs the two engines of the untied pool")
        alone = object.__new__(RolloutPool)
        alone.__dict__ |= pool.__dict__ | {"fleet": copy(pool.fleet)}
        alone.fleet.members = pool.fleet.members[:1]
        both, one = (p.generate(PROBLEMS, 5, seed=3, step=0) for p in (pool, alone))
        assert torch.equal(both.token_ids, one.token_ids)
        torch.testing.assert_close(both.sampled_logps, one.sampled_logps, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_an_engine_lost_in_the_middle_is_rebuilt_and_every_sample_is_the_same(self, pool, how) -> None:
        problems = [Problem(f"q{i}", f"{i} and {i * i}", None) for i in range(60)]
        load(pool, make_model(tied=pool.tied, seed=1), version=11)
        started = time.monotonic()
        expected = pool.generate(problems, 4, seed=7, step=1)
        took = time.monotonic() - started
        victim = pool.fleet.members[-1]
        old, notes = victim.info.place.pid, []
        pool.fleet._note = notes.append
        limits(pool, silence_timeout_s=8)
        killer = threading.Timer(0.4 * took, os.kill, (old, how))
        killer.start()
        rollouts = pool.generate(problems, 4, seed=7, step=1)
        killer.join()
        word = "died" if how == signal.SIGKILL else "no answer from"
        assert word in notes[0]
        assert "it is rebuilt, its " in notes[0]
        assert int(notes[0].partition("its ")[2].split()[0]) > 0
        assert torch.equal(rollouts.token_ids, expected.token_ids)
        torch.testing.assert_close(rollouts.sampled_logps, expected.sampled_logps, atol=1e-5, rtol=0)
        assert set(rollouts.policy_version.tolist()) == {11}
        deadline = time.monotonic() + 60
        while victim.info is None and time.monotonic() < deadline:  # the batch waits for no engine where it has another
            pool.generate(problems[:2], 4, seed=0, step=0)
        assert victim.info.place.pid != old
        assert max_error(pool, make_model(tied=pool.tied, seed=1)) < 1e-4  # it has the new weights, not those on disk
        load(pool, make_model(tied=pool.tied, seed=0), version=0)

    def test_an_engine_lost_between_batches_or_while_weights_load_is_rebuilt(self, pool) -> None:
        new = make_model(tied=pool.tied, seed=1)
        os.kill(pool.fleet.members[-1].info.place.pid, signal.SIGKILL)
        load(pool, new, version=12)
        assert sampled_until_all_are_back(pool) == {12}
        assert max_error(pool, new) < 1e-4
        load(pool, make_model(tied=pool.tied, seed=0), version=0)

    def test_losing_an_engine_too_often_ends_the_run_and_says_so(self, pool) -> None:
        limits(pool, max_restarts=0, silence_timeout_s=7)
        member = pool.fleet.members[-1]
        os.kill(member.info.place.pid, signal.SIGSTOP)
        silent = rf"generating: no answer from {member.seat.name} within 7 s\n  it was process \d+ on node [\d.]+"
        message = rf"lost 1 times in a row \(rollout\.max_restarts\): {silent}; the end of its log .*\.err:\n    .*\S"
        with pytest.raises(ActorError, match=message):
            pool.generate(PROBLEMS, 2, seed=0, step=0)
        limits(pool, max_restarts=3)
        pool.generate(PROBLEMS, 2, seed=0, step=0)

    def test_a_batch_that_takes_too_long_is_given_up(self, pool) -> None:
        limits(pool, generate_timeout_s=0.05)
        problems = [Problem(f"q{i}", f"{i}", None) for i in range(90)]
        with pytest.raises(ActorError, match=r"generating: \d+ of 360 completions are missing after 0\.05 s"):
            pool.generate(problems, 4, seed=0, step=0)
        limits(pool, generate_timeout_s=120)
        assert len(pool.generate(PROBLEMS, 2, seed=0, step=0)) == 6  # what was left of the other batch is dropped


def limits(pool, **changes) -> None:
    pool.fleet.config = pool.fleet.config.model_copy(update=changes)


def make_adapter(base: torch.nn.Module, seed: int):
    """Random adapters on every linear layer of `base`, and what an engine is sent of them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=6.0, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, settings).eval()


@pytest.mark.slow
def test_adapters_are_applied_beside_the_weights(local_ray, tokenizer, tmp_path: Path) -> None:
    import ray

    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool

    config = run_config(policy={"gpus_per_rank": 0, "lora": {"r": 4, "sync": "adapter"}})
    pool = RolloutPool(config, save_model(tmp_path / "model", tied=True, seed=0), tokenizer, plan=plan(config))
    try:
        assert max_error(pool, make_model(tied=True, seed=0)) < 1e-4
        for version in (3, 4):  # the second replaces the first
            adapted = make_adapter(make_model(tied=True, seed=0), seed=version)
            assert max_error(pool, adapted) > 0.1
            adapted.save_pretrained(tmp_path / str(version))
            files = {path.name: path.read_bytes() for path in (tmp_path / str(version)).glob("adapter_*")}
            reference = ray.put(files)
            pool.load_adapter(lambda ref=reference: ref, version)
            assert max_error(pool, adapted) < 1e-4
            assert pool.generate(PROBLEMS, 2, seed=0, step=0).policy_version.tolist() == [version] * 6
        with pytest.raises(ActorError, match="loading adapter 5: engine 0"):
            pool.load_adapter(lambda: ray.put({"adapter_config.json": b"{}"}), 5)
        with pytest.raises(ActorError, match="half-loaded"):
            pool.generate(PROBLEMS, 2, seed=0, step=0)
        pool.load_adapter(lambda: ray.put(files), 4)
        assert max_error(pool, adapted) < 1e-4
    finally:
        pool.shutdown()


@pytest.mark.slow
def test_engine_that_cannot_load_says_why(local_ray, tokenizer, tmp_path: Path) -> None:
    from rlattn.rollout.placement import plan
    from rlattn.rollout.pool import RolloutPool

    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ActorError, match=r"starting engines: engine 0 (.|\n)*no-such-model"):
        RolloutPool(run_config(), str(tmp_path), tokenizer, plan=plan(run_config()))
    config = run_config(rollout={"start_timeout_s": 0.1})
    with pytest.raises(ActorError, match=r"starting engines: no answer from engine 0 within 0\.1 s"):
        RolloutPool(config, str(tmp_path), tokenizer, plan=plan(config))
