"""One vLLM engine. A plain class, made a Ray actor by the pool; vllm is imported when one is made."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from rlattn.config import HeadsConfig
from rlattn.kernels import AttentionStatistics, StatisticsOptions
from rlattn.rollout.cluster import Place, place
from rlattn.rollout.decoding import decoded_of, signal_weights
from rlattn.rollout.worker_setup import leave_source_tree
from rlattn.signals import HeadSums, SignalRows, reduce_rows
from rlattn.types import Decoded, ExtraSignal

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput

    from rlattn.rollout.transfer import Bucket

HEARTBEAT_S = 5.0  # longest time that an engine samples without a word

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One completion to sample: its prompt, the seed of its own random stream, and the temperature (0 is greedy)."""

    prompt: list[int]
    seed: int
    temperature: float


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: [N] int64, with the end-of-sequence token where it was sampled.
        logps: [N] fp32, log-probs of these tokens at the sampling temperature.
        truncated: stopped by the token limit.
        version: of the weights that sampled it.
        decoded: what sampling measured, if it was to and nothing came between.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    truncated: bool
    version: int
    decoded: Decoded | None = None


class EngineInfo(NamedTuple):
    """Where a loaded engine lives, the seconds that loading took, and how many requests it samples side by side."""

    place: Place
    load_seconds: float
    max_num_seqs: int


class Activity(NamedTuple):
    """What an engine has been doing with a batch so far.

    Attributes:
        running, waiting: requests now being sampled, and in vLLM's queue.
        most_waiting: there at a time.
        prompt_tokens, cached_tokens: of the finished requests' prompts; those of them that the prefix cache had.
        preemptions: how often a request lost its place in the KV cache to others, and was begun again.
    """

    running: int = 0
    waiting: int = 0
    most_waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Progress(NamedTuple):
    """What an engine has finished, which requests it gave up as too long, and what it is doing now."""

    finished: dict[int, Completion]
    cut: list[int]
    activity: Activity


def ends_with_its_workers(call: Callable[Concatenate[Engine, P], T]) -> Callable[Concatenate[Engine, P], T]:
    """A call that ends the engine's process if it failed because one of its tensor-parallel workers had died.

    So an engine that lost a part of itself is lost as a whole, and rebuilt; any other failure is the caller's.
    """

    @wraps(call)
    def guarded(engine: Engine, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(engine, *args, **kwargs)
        except Exception:
            if not engine.lost_a_worker:
                raise
            traceback.print_exc()  # the log's end is shown to whoever misses this engine
            os._exit(1)

    return guarded


class Engine:
    """A `vllm.LLM` and the version of the weights it holds.

    `version` is None from the start of a weight update to its end, and while it is `asleep`, so that neither a
    half-updated engine nor one without weights ever samples.
    """

    def __init__(self, engine_args: dict[str, Any], version: int = 0) -> None:
        """Import vLLM, which takes its time; `engine_args` are `vllm.LLM`'s (see `rlattn.rollout.engine_args`)."""
        leave_source_tree()
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # empty it crashes vLLM, set it overrides kv_cache_memory_bytes
        import vllm  # noqa: F401

        self._args = engine_args
        self._backend = engine_args.get("weight_transfer_config", {}).get("backend")
        self.version: int | None = version
        self.asleep = False
        self.adapter: LoRARequest | None = None
        self._batch = 0
        self._rows: SignalRows | None = None
        self._numbers: dict[str, int] = {}  # of unfinished requests, by vLLM's name for them
        self._prompt_tokens = self._cached_tokens = self._most_waiting = 0
        self._preempted: dict[str, int] = {}  # how often, by request

    def load(self) -> EngineInfo:
        """Load the model, before anything else; returns what a fleet needs to know of this engine."""
        from vllm import LLM

        started = time.perf_counter()
        self.llm = LLM(**self._args)
        most = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        return EngineInfo(place(), time.perf_counter() - started, most)

    @property
    def lost_a_worker(self) -> bool:
        """Whether one of the processes of a tensor-parallel engine has died."""
        core: Any = self.llm.llm_engine.engine_core
        return getattr(core.engine_core.model_executor, "is_failed", False)

    @ends_with_its_workers
    def advance(
        self,
        batch: int,
        new: list[tuple[int, Request]],
        *,
        patience_s: float,
        top_p: float,
        max_tokens: int,
        longest: int | None = None,
        group: int = 1,
        groups: Tensor | None = None,
        extra: tuple[ExtraSignal, ...] = (),
    ) -> Progress:
        """Take `new` requests of a batch, sample for a while, and return what is finished, by request number.

        A completion of more than `longest` tokens is given up, and with it its group: requests whose numbers give the
        same quotient by `group`. By the head groups `groups` [L, H], where they are given (`signals.forward: decode`),
        attention is measured on the way, WAAD, FAI and the `extra` signals.

        It ends when nothing is left, after `HEARTBEAT_S` seconds, or after `patience_s` once something is finished.
        What is left of another batch is dropped first. What is sampled depends only on the requests and the weights:
        the prefix cache, whose hits change the last bits of log-probs, is emptied with every batch.

        Raises:
            RuntimeError: the weights are half-loaded, or put away.
        """
        from vllm import RequestOutput

        if self.asleep:
            raise RuntimeError("the engine is asleep until new weights or a new adapter come")
        if self.version is None:
            raise RuntimeError("the engine's weights are half-loaded: a weight update did not finish")
        if batch != self._batch:
            self._drop()
            self._batch = batch
        if groups is not None:
            self.llm.collective_rpc("rlattn_weigh", args=(signal_weights(groups, extra).tolist(),))
        self._enqueue(new, top_p=top_p, max_tokens=max_tokens)
        finished: dict[int, Completion] = {}
        names: dict[str, int] = {}  # of those finished
        cut: list[int] = []
        start = time.monotonic()
        while self.llm.llm_engine.has_unfinished_requests():
            if time.monotonic() - start > (patience_s if finished else HEARTBEAT_S):
                break
            ended = [output for output in self.llm.llm_engine.step() if output.finished]
            if ended and groups is not None:  # at once: the next step may give their place to others
                self.llm.collective_rpc("rlattn_keep", args=([output.request_id for output in ended],))
            for output in ended:
                assert isinstance(output, RequestOutput)
                number = names[output.request_id] = self._numbers.pop(output.request_id)
                finished[number] = self._completion(output.outputs[0])
                self._prompt_tokens += len(output.prompt_token_ids or ())
                self._cached_tokens += output.num_cached_tokens or 0
            if longest is not None:
                cut += self._cut(longest, group)
            self._look_at_queue()
        if names and groups is not None:
            for name, decoded in decoded_of(self.llm.collective_rpc("rlattn_pull"), groups, extra).items():
                if name in names:  # not of a batch that failed
                    finished[names[name]] = replace(finished[names[name]], decoded=decoded)
        return Progress(finished, cut, self._activity())

    def _cut(self, longest: int, group: int) -> list[int]:
        """Give up the groups of requests that have more tokens than `longest`; returns the numbers given up."""
        requests = self._scheduler.requests.values()
        long = {r.request_id.partition("-")[0] for r in requests if r.num_output_tokens > longest}
        groups = {self._numbers[name] // group for name in long & self._numbers.keys()}
        names = [name for name, number in self._numbers.items() if number // group in groups]
        self.llm.llm_engine.abort_request(names)
        return [self._numbers.pop(name) for name in names]

    def _activity(self) -> Activity:
        running, waiting = self._scheduler.get_request_counts()
        preemptions = sum(self._preempted.values())
        tokens = self._prompt_tokens, self._cached_tokens
        return Activity(running, waiting, self._most_waiting, *tokens, preemptions)

    def _look_at_queue(self) -> None:
        """Note its length, and who was sent back to it: vLLM counts that itself only with its statistics on."""
        waiting = self._scheduler.get_request_counts()[1]
        self._most_waiting = max(self._most_waiting, waiting)
        if waiting:
            self._preempted |= {r.request_id: r.num_preemptions for r in self._scheduler.waiting if r.num_preemptions}

    @property
    def _scheduler(self) -> Any:
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.scheduler  # in this process, see `engine_env`

    def _enqueue(self, new: list[tuple[int, Request]], *, top_p: float, max_tokens: int) -> None:
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(
                temperature=request.temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                seed=request.seed,
                logprobs=0,  # the sampled token's own
                flat_logprobs=True,
                detokenize=False,
            )
            for _, request in new
        ]
        prompts = [TokensPrompt(prompt_token_ids=request.prompt) for _, request in new]
        names = self.llm.enqueue(prompts, params, lora_request=self.adapter, use_tqdm=False) if new else []
        for name, (number, _) in zip(names, new, strict=True):
            self._numbers[name.partition("-")[0]] = number  # vLLM adds a suffix, then drops it

    def _drop(self) -> None:
        """Forget every request, and the keys and values of their prompts."""
        self.llm.llm_engine.abort_request(list(self._numbers))
        self._numbers, self._preempted = {}, {}
        self._prompt_tokens = self._cached_tokens = self._most_waiting = 0
        self.llm.reset_prefix_cache()

    def _completion(self, output: CompletionOutput) -> Completion:
        from vllm.logprobs import FlatLogprobs

        assert isinstance(output.logprobs, FlatLogprobs)
        assert self.version is not None
        return Completion(
            token_ids=np.asarray(output.token_ids, dtype=np.int64),
            logps=np.asarray(output.logprobs.logprobs, dtype=np.float32),
            truncated=output.finish_reason == "length",
            version=self.version,
        )

    @ends_with_its_workers
    def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU's memory back until something is loaded: the KV cache's, and the weights', which are kept in the
        node's memory or not at all. On a CPU vLLM frees nothing; all else is the same.
        """
        self._drop()
        self.llm.sleep(level=1 if keep_weights else 2)
        self.asleep, self.version = True, None

    def _wake(self, *tags: str) -> None:
        """Have memory again, of the weights first: the cache's comes when what loading needed is free again."""
        if self.asleep:
            self.llm.wake_up(tags=list(tags))

    @ends_with_its_workers
    def load_adapter(self, files: dict[str, bytes], version: int) -> int:
        """Apply an adapter (PEFT's files by name) beside the weights, in place of the one before; returns their bytes.

        Raises:
            RuntimeError: vLLM did not take it; until one is taken, the engine refuses to sample.
        """
        from vllm.lora.request import LoRARequest

        self._wake("weights", "kv_cache")
        self.asleep, self.version = False, None
        # vLLM knows an adapter by its number, and has room for one: the new one drives the old one out.
        number = self.adapter.lora_int_id + 1 if self.adapter else 1
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            adapter = LoRARequest(f"adapter-{number}", number, folder)
            if not self.llm.llm_engine.add_lora(adapter):
                raise RuntimeError(f"vLLM did not load the adapter of version {version}")
        self.llm.reset_prefix_cache()
        self.adapter, self.version = adapter, version
        return sum(map(len, files.values()))

    @ends_with_its_workers
    def measure(
        self,
        token_ids: list[list[int]],
        starts: list[int],
        layers: list[int],
        options: StatisticsOptions,
        *,
        spans: bool,
        receivers: int | None,
    ) -> HeadSums:
        """Attention statistics of whole sequences by these weights; kept for `reduce`, their sums returned.

        `starts` are the sequences' first response tokens; the rest as in `SignalRows.collect`.
        """
        from rlattn.rollout.attention import attention_statistics

        self._drop()
        found = attention_statistics(self.llm, token_ids, layers=layers, response_starts=starts, options=options)
        lengths = torch.tensor([len(ids) for ids in token_ids])
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        packed = {layer: joined([of_one[layer] for of_one in found]) for layer in layers}
        bounds = cu_seqlens, cu_seqlens[:-1] + torch.tensor(starts)
        self._rows = SignalRows.collect(packed, layers, *bounds, spans=spans, receivers=receivers)
        return self._rows.sums

    def reduce(self, heads: HeadsConfig, groups: Tensor, extra: tuple[ExtraSignal, ...]) -> dict[str, Tensor]:
        """What `measure` kept, reduced by head groups [L, H] to WAAD and FAI: [t] fp32 each."""
        rows, self._rows = self._rows, None
        assert rows is not None, "reduce without measure"
        return reduce_rows(rows, heads, groups, extra)

    @ends_with_its_workers
    def begin_weights(self) -> None:
        """Open a weight update."""
        self._wake("weights")
        self.version = None
        self.llm.collective_rpc("rlattn_begin_weights")

    @ends_with_its_workers
    def load_bucket(self, bucket: dict[str, Tensor], expected: dict[str, str] | None = None) -> int:
        """Load some full, unsharded CPU tensors under their Hugging Face names; returns their bytes.

        Raises:
            ValueError: they do not have the `expected` checksums.
        """
        # Bytes pass to workers of every kind: in this process, or in others when the engine spans GPUs.
        contiguous = {name: tensor.contiguous() for name, tensor in bucket.items()}
        self.llm.collective_rpc("rlattn_load_bucket", args=(save(contiguous), expected))
        return sum(tensor.nbytes for tensor in contiguous.values())

    @ends_with_its_workers
    def meet(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the group that rank 0 of the policy broadcasts weights to; this engine's workers are `rank` and up."""
        where = {"master_address": host, "master_port": port, "rank_offset": rank, "world_size": world_size}
        self.llm.init_weight_transfer_engine({"init_info": where})

    @ends_with_its_workers
    def load_shared(self, bucket: Bucket) -> int:
        """Load weights that lie in a policy rank's GPU memory, or are broadcast from there; returns their bytes.

        Raises:
            ValueError: they do not have the checksums that the bucket has.
        """
        info: dict[str, Any] = {"names": bucket.names, "dtype_names": bucket.dtypes, "shapes": bucket.shapes}
        if self._backend == "ipc":
            info["ipc_handles"] = bucket.handles
        self.llm.collective_rpc("rlattn_load_shared", args=(info, bucket.checksums))
        return bucket.size

    @ends_with_its_workers
    def finish_weights(self, version: int) -> None:
        """Close the update, drop keys and values of the old weights, and carry the new version."""
        self.llm.collective_rpc("rlattn_finish_weights")
        self._wake("kv_cache")
        self.llm.reset_prefix_cache()
        self.asleep, self.version = False, version


def joined(parts: list[AttentionStatistics]) -> AttentionStatistics:
    """Statistics of sequences [H, N] as those of a packed batch [H, t]."""
    columns: dict[str, Any] = {}
    for field in fields(AttentionStatistics):
        own = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if own[0] is None else torch.cat(own, -1)
    return AttentionStatistics(**columns)
