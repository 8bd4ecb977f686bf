"""Engines as one: requests are split among them, completions come back packed.

Shape legend: [T] tokens of the packed batch, [B] sequences (problems times generations).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlattn.config import ConfigError, RunConfig
from rlattn.kernels import capture_layers
from rlattn.problem import Problem
from rlattn.rollout import transfer
from rlattn.rollout.checksums import checksums
from rlattn.rollout.cluster import outcome
from rlattn.rollout.engine import Completion, Engine, Request
from rlattn.rollout.engine_args import engine_args, engine_env
from rlattn.rollout.fleet import Audience, Everyone, Fleet, OnlyOne
from rlattn.rollout.long_tail import Shortest
from rlattn.rollout.placement import Plan, Seat
from rlattn.rollout.scoring import score_signals, signals_of
from rlattn.signals import HeadGroups, group_tensor
from rlattn.types import ExtraSignal, Rollouts, Scores

CUT_PATIENCE_S = 0.25  # likewise, where it may show that others are too long
STREAM_PATIENCE_S = 0.1  # how long what is finished may wait for more, where somebody saves it


@dataclass(frozen=True)
class Ask:
    """A problem, how many completions of it to sample, and at which temperature (0 is greedy)."""

    problem: Problem
    samples: int
    temperature: float


class RolloutPool:
    """`rollout.num_engines` vLLM engines, each a Ray actor; `version` is that of the weights they hold."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        plan: Plan,
        group: PlacementGroup | None = None,
        version: int = 0,
        note: Callable[[str], None] = lambda text: None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Start the engines in their seats and wait until all are loaded; Ray must be running. `note` tells of losses.

        Their processes start at once, but load nothing before `ready` returns.

        Raises:
            ConfigError: `rollout.engine_args` holds a key that rlattn sets.
            ActorError: an engine failed, died or was not loaded within `rollout.start_timeout_s`.
        """
        self.config, self.tokenizer, self.version = config, tokenizer, version
        env = engine_env(config)
        backends = {seat.name: transfer.backend(config, plan, seat) for seat in plan.engines}
        self._broadcast_to = {name for name, kind in backends.items() if kind == "nccl"}
        self._broadcasts: transfer.Broadcasts | None = None
        self._sent = 0, 0.0  # bytes and seconds of the last transfer
        self.layers: list[int] = []  # that engines are asked about
        if config.signals.source == "rollout":
            shape = AutoConfig.from_pretrained(model_path)
            self.layers = capture_layers(shape, config.signals.layers, config.signals.layer_range)
        args = {name: engine_args(config, model_path, kind, self.layers) for name, kind in backends.items()}

        def make(seat: Seat) -> Any:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle) if group else None
            actor = ray.remote(Engine).options(
                num_cpus=seat.cpus, num_gpus=seat.gpus, runtime_env={"env_vars": env}, scheduling_strategy=where
            )
            return actor.remote(args[seat.name], version)

        self.fleet = Fleet(config.rollout, plan.engines, make, note)
        try:
            self.fleet.start(ready)
        except BaseException:
            self.shutdown()
            raise

    def check_prompts(self, problems: list[Problem]) -> list[list[int]]:
        """Token ids of each prompt (see `prompt_text`), tokenized in one batch; no special tokens are added.

        Raises:
            ConfigError: names a problem whose prompt is empty or longer than `rollout.max_prompt_length`.
        """
        return encode_prompts(problems, self.tokenizer, self.config.rollout.max_prompt_length)

    def generate(
        self,
        problems: list[Problem],
        num_generations: int,
        *,
        seed: int,
        step: int,
        first: int = 0,
        temperature: float | None = None,
        max_tokens: int | None = None,
        keep: int | None = None,
        groups: HeadGroups | None = None,
        extra: Sequence[ExtraSignal] = (),
    ) -> Rollouts:
        """Sample `num_generations` completions a problem; sequence b answers problem b // num_generations.

        Sequence b draws from its own stream, seeded by (seed, step, first + b): the same call twice gives the same
        tokens, and the number of engines changes nothing but the batches that the forward sees.

        Args:
            problems: what to answer.
            num_generations: completions of each.
            seed: of the run (give evaluation another one than training).
            step: of the run.
            first: how many sequences of this step were sampled before.
            temperature: of sampling, 0 is greedy; `rollout.temperature` if None.
            max_tokens: of a completion; `rollout.max_completion_length` if None.
            keep: problems whose completions are returned, those that end soonest (see `rlattn.rollout.long_tail`); all
                if None.
            groups: [L][H], the head groups by which signals are measured on the way, `extra` ones too, where
                `signals.forward` is decode; None measures nothing.
            extra: as in `score`.

        Raises:
            ValueError: no problems, a prompt that does not fit, or `max_tokens` outside 1..max_completion_length.
            ActorError: an engine failed, died or needed longer than `rollout.generate_timeout_s`.
        """
        rollout = self.config.rollout
        limit = rollout.max_completion_length
        temperature = rollout.temperature if temperature is None else temperature
        sampling: dict[str, Any] = {"top_p": rollout.top_p, "max_tokens": limit if max_tokens is None else max_tokens}
        if groups is not None:
            sampling |= {"groups": group_tensor(groups), "extra": tuple(extra)}
        if not problems or num_generations < 1:
            raise ValueError(f"{len(problems)} problems x {num_generations} generations: need at least one of each")
        if not 1 <= sampling["max_tokens"] <= limit:
            raise ValueError(f"max_tokens={max_tokens} must lie in 1..{limit} (rollout.max_completion_length)")
        prompts = [prompt for prompt in self.check_prompts(problems) for _ in range(num_generations)]
        requests = [
            Request(prompt, request_seed(seed, step, index), temperature) for index, prompt in enumerate(prompts, first)
        ]
        done: dict[int, Completion] = {}
        numbered = list(enumerate(requests))
        units = [numbered[i : i + num_generations] for i in range(0, len(numbered), num_generations)]
        if keep is None or keep >= len(problems):
            for part in self.fleet.run(units, **sampling):
                done |= part
            return self._pack(problems, prompts, [done[place] for place in range(len(requests))])
        shortest = Shortest(num_generations, keep)
        sampling |= {"group": num_generations}
        for part in self.fleet.run(units, patience_s=CUT_PATIENCE_S, longest=shortest.longest, **sampling):
            done |= part
            shortest.add({number: len(completion.token_ids) for number, completion in part.items()})
        kept = shortest.groups()
        places = [place for group in kept for place, _ in units[group]]
        return self._pack([problems[group] for group in kept], [prompts[p] for p in places], [done[p] for p in places])

    def stream(self, asks: Sequence[Ask], *, seed: int) -> Iterator[tuple[int, list[tuple[str, Completion]]]]:
        """Sample what is asked; yields the index of each ask with its texts and completions when all are finished.

        Sample j of a problem draws from its own stream, seeded by (seed, problem id, j): leaving other problems out
        changes nothing but the batches that the forward sees.

        Raises:
            ConfigError: a prompt that does not fit.
            ActorError: an engine failed or died, or all were silent for `rollout.generate_timeout_s`.
        """
        rollout = self.config.rollout
        units: list[list[tuple[int, Request]]] = []
        index_of: list[int] = []  # which ask a request is of
        prompts = self.check_prompts([ask.problem for ask in asks])
        for index, (ask, prompt) in enumerate(zip(asks, prompts, strict=True)):
            key = zlib.crc32(ask.problem.id.encode())
            requests = [Request(prompt, request_seed(seed, key, j), ask.temperature) for j in range(ask.samples)]
            units.append(list(enumerate(requests, len(index_of))))
            index_of += [index] * ask.samples
        waiting: dict[int, dict[int, Completion]] = {index: {} for index in range(len(asks))}
        sampling: dict[str, Any] = {"top_p": rollout.top_p, "max_tokens": rollout.max_completion_length}
        for part in self.fleet.run(units, patience_s=STREAM_PATIENCE_S, **sampling):
            for place, completion in part.items():
                index = index_of[place]
                waiting[index][place] = completion
                if len(waiting[index]) == asks[index].samples:
                    done = [completion for _, completion in sorted(waiting.pop(index).items())]
                    yield index, list(zip(self._texts(done), done, strict=True))

    def score(self, rollouts: Rollouts, groups: HeadGroups | None, extra: Sequence[ExtraSignal]) -> Scores:
        """What the engines say about finished sequences that their weights sampled: see `signals.source`.

        Attention signals are those that sampling measured by the same groups, the others come from a prefill of the
        whole sequences; log-probs are from their sampling; entropy is 0.

        Args:
            rollouts: the batch.
            groups: [L][H], the head groups to use; None measures them.
            extra: further signals that the credit strategy needs.

        Raises:
            ActorError: as `generate`; an engine that is lost is rebuilt, and everything measured again.
        """
        prefill = partial(score_signals, self.fleet, self.config, self.layers, extra)
        signals = self.fleet.insist(partial(signals_of, rollouts, self.layers, groups, extra, prefill))
        return Scores(rollouts.sampled_logps, torch.zeros_like(rollouts.sampled_logps), signals)

    def sleep(self) -> None:
        """Have every engine give its memory back until `load_weights` or `load_adapter`, see `rollout.sleep`."""
        keep = self.config.policy.sends_adapters  # an adapter is nothing without the weights beside it
        timeout_s = self.config.rollout.weights_timeout_s
        everyone = Everyone(self.fleet)
        everyone.tell("going to sleep", timeout_s, lambda engine: engine.sleep.remote(keep_weights=keep))

    def load_weights(self, weights: Callable[[], Iterable[ray.ObjectRef]], version: int) -> None:
        """Move new weights into every engine, then empty prefix caches and carry `version`.

        Args:
            weights: gives refs, each of a `dict[str, Tensor]`: full, unsharded CPU tensors under Hugging Face names.
                Taken one at a time, so a generator may gather the next while none but the last is held. Called again
                for an engine that is rebuilt before the next weights come, so it must then still give these.
            version: of the weights; completions sampled from now on say it.

        Raises:
            ActorError: names an engine that failed, which leaves it half-loaded, so that it refuses to generate; or one
                that has been lost too often.
        """
        phase = f"loading weights {version}"

        def send(audience: Audience) -> int:
            tell = audience.tell
            deadline = time.monotonic() + self.config.rollout.weights_timeout_s
            tell(f"{phase} (begin)", _left(deadline), lambda e: e.begin_weights.remote())
            sent = 0
            for index, bucket in enumerate(weights()):
                expected = None
                if self.config.rollout.check_weights:
                    expected = checksums(outcome(bucket, "the object store", f"{phase} (checksums)", _left(deadline)))
                load = partial(_load_bucket, bucket, expected)
                sent += sum(tell(f"{phase} (bucket {index})", _left(deadline), load))
            tell(f"{phase} (finish)", _left(deadline), lambda e: e.finish_weights.remote(version))
            return sent

        self._publish(send, version)

    def take_weights(self, source: transfer.Source, version: int) -> None:
        """As `load_weights`, with weights that go from the source's GPUs to the engines'; see `transfer.direct`.

        An engine that is rebuilt before the next update is given what the source has then, which must still be these;
        with `rollout.steps_ahead`, what it kept of them.
        """
        if self._broadcasts is None or self._broadcasts.source is not source:
            width = self.config.rollout.tensor_parallel_size
            self._broadcasts = transfer.Broadcasts(source, self._broadcast_to, width)
        phase, timeout_s = f"loading weights {version}", self.config.rollout.weights_timeout_s
        send = partial(transfer.send, self._broadcasts, phase=phase, timeout_s=timeout_s, version=version)
        self._publish(send, version, again=partial(send, again=bool(self.config.rollout.steps_ahead)))

    def load_adapter(self, adapter: Callable[[], ray.ObjectRef], version: int) -> None:
        """Have every engine apply an adapter beside its weights, in place of the one before, and carry `version`.

        Args:
            adapter: gives a ref of a `dict[str, bytes]`: an adapter in PEFT's format, by file name. Called again for an
                engine that is rebuilt before the next one comes.
            version: of the policy; completions sampled from now on say it.

        Raises:
            ActorError: as `load_weights`.
        """
        timeout_s = self.config.rollout.weights_timeout_s

        def send(audience: Audience) -> int:
            files = adapter()
            phase = f"loading adapter {version}"
            return sum(audience.tell(phase, timeout_s, lambda e: e.load_adapter.remote(files, version)))

        self._publish(send, version)

    def _publish(
        self, send: Callable[[Audience], int], version: int, again: Callable[[Audience], int] | None = None
    ) -> None:
        """Send (which gives the bytes) to every engine, and `again` to each that is rebuilt from now on."""
        start = time.perf_counter()
        self._sent = send(Everyone(self.fleet)), time.perf_counter() - start
        self.version = version
        self.fleet.supply = lambda member: (again or send)(OnlyOne(member))

    def metrics(self) -> dict[str, float]:
        """What the engines did in the last batch, see `Fleet.metrics`; of the last weights or adapter sent to them
        `rollout/sent_mib`, over all engines, and `perf/sent_mib_per_second`, gathering and loading among it.
        """
        size, seconds = self._sent
        sent = {"rollout/sent_mib": size / 2**20, "perf/sent_mib_per_second": size / 2**20 / seconds} if size else {}
        return self.fleet.metrics() | sent

    def shutdown(self) -> None:
        """End the engines' actors; safe to call twice."""
        self.fleet.shutdown()

    def _texts(self, completions: list[Completion]) -> list[str]:
        return self.tokenizer.batch_decode([c.token_ids.tolist() for c in completions], skip_special_tokens=True)

    def _pack(self, problems: list[Problem], prompts: list[list[int]], completions: list[Completion]) -> Rollouts:
        size, groups = len(prompts), len(prompts) // len(problems)
        tokens, logps = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens += [np.asarray(prompt, dtype=np.int64), completion.token_ids]
            logps += [np.zeros(len(prompt), dtype=np.float32), completion.logps]
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])  # [B]
        lengths = prompt_lengths + torch.tensor([len(completion.token_ids) for completion in completions])  # [B]
        group_ids = torch.arange(len(problems)).repeat_interleave(groups)  # [B]
        return Rollouts(
            token_ids=torch.from_numpy(np.concatenate(tokens)),  # [T]
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),  # [B+1]
            prompt_lengths=prompt_lengths,
            sampled_logps=torch.from_numpy(np.concatenate(logps)),  # [T]
            group_ids=group_ids,
            truncated=torch.tensor([completion.truncated for completion in completions]),  # [B]
            policy_version=torch.tensor([completion.version for completion in completions]),  # [B]
            rewards=torch.full((size,), torch.nan),  # [B]
            texts=self._texts(completions),
            problems=[problems[group] for group in group_ids.tolist()],
            reward_parts={},
            decoded=[c.decoded for c in completions] if self.config.signals.forward == "decode" else None,
        )


def encode_prompts(problems: list[Problem], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[list[int]]:
    """Token ids of each prompt; see `RolloutPool.check_prompts`. Needs no engine."""
    texts = [prompt_text(problem, tokenizer) for problem in problems]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for problem, ids in zip(problems, encoded, strict=True):
        if not 1 <= len(ids) <= limit:
            raise ConfigError(
                f"prompt of problem {problem.id!r} has {len(ids)} tokens; accepted are 1 to {limit} "
                f"(rollout.max_prompt_length)"
            )
    return encoded


def prompt_text(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model sees: the prompt, as a user's message in the chat template where both have one."""
    if not problem.chat or not tokenizer.chat_template:
        return problem.prompt
    message = [{"role": "user", "content": problem.prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def request_seed(seed: int, step: int, index: int) -> int:
    """Seed of one request's stream, in 0..2^63-1: a hash, so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _load_bucket(bucket: ray.ObjectRef, expected: dict[str, str] | None, engine: Any) -> ray.ObjectRef:
    return engine.load_bucket.remote(bucket, expected)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
