"""Attention signals measured while a completion is sampled, so that nothing is forwarded twice.

Every decoding step adds its rows to a store beside the KV cache (`rlattn.kernels.paged`). When a completion is
finished, its rows are reduced by the head groups, which are known beforehand, to a number a token.

[n] rows of a completion, [L] captured layers, [H] query heads, [C] signals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from rlattn.kernels import StatisticsOptions
from rlattn.kernels.paged import FAI, SINK_MASS, WAAD, decode_statistics
from rlattn.kernels.statistics import AttentionVariant
from rlattn.rollout.capture import variant_of
from rlattn.signals import GLOBAL, LOCAL
from rlattn.types import Decoded, ExtraSignal

WORKER = "rlattn.rollout.decoding_worker.DecodingWorker"
SECTION = "rlattn"  # of vLLM's `additional_config`
MOST_ROWS = 1 << 16  # that are reduced at a time, 3 KB each for five layers of 16 heads
STEPS = 3  # a finished request was in one of so many last steps, as vLLM schedules up to two ahead of its outputs


def listening_args(layers: Sequence[int], options: StatisticsOptions) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that have sampling listened to in some layers."""
    settings = {"layers": list(layers), "options": asdict(options)}
    return {"worker_cls": WORKER, "additional_config": {SECTION: settings}, "disable_cascade_attn": True}


def signal_weights(groups: Tensor, extra: Sequence[ExtraSignal] = ()) -> Tensor:
    """[C, L, 3, H] fp64: what each head's statistics weigh in WAAD, FAI and the `extra` signals.

    `groups` is [L, H] int8; all 0 means every head (`signals.heads.select: all`).
    """
    every = torch.ones_like(groups, dtype=torch.bool)
    chosen = [(WAAD, groups == LOCAL), (FAI, groups == GLOBAL)] if groups.any() else [(WAAD, every), (FAI, every)]
    weights = torch.zeros(2 + len(extra), len(groups), 3, groups.shape[1], dtype=torch.float64)
    for column, (kind, heads) in enumerate(chosen + [(FAI, every) for _ in extra]):  # `fai_all` is the only one
        weights[column, :, kind] = heads / heads.sum()
    return weights


def decoded_of(workers: Sequence[bytes], groups: Tensor, extra: Sequence[ExtraSignal]) -> dict[str, Decoded]:
    """By request name, what `SlotStore.pull` of every tensor-parallel worker, each with its own heads, adds up to."""
    parts = [load(part) for part in workers]
    found = {}
    for key in parts[0]:
        name, _, kind = key.partition("/")
        if kind == "signals":
            columns = torch.stack([part[key] for part in parts]).sum(0).float()  # [C, n]
            sinks = torch.cat([part[f"{name}/sink_mass"] for part in parts], -1)
            found[name] = Decoded(dict(zip(("waad", "fai", *extra), columns, strict=True)), sinks, groups)
    return found


@dataclass
class Track:
    """Where a request's tokens lie in the KV cache.

    Attributes:
        blocks: of the cache, in order.
        prompt: tokens of its prompt.
        whole: every row behind the prompt was decoded: it was not preempted, which has rows computed in bulk again.
    """

    blocks: list[int]
    prompt: int
    whole: bool = True


class SlotStore:
    """What the tokens in one worker's KV cache have shown while they were decoded.

    Args:
        layers: index -> vLLM's attention layer.
        options: what is measured.
        blocks, block_size: of the KV cache.
        device: where that lies.
        dtype: of queries and keys.
        first_head: of all query heads, this worker's first.

    Raises:
        ValueError: an attention backend that keeps its rows' log-sum-exp to itself, or layers that differ in heads.
    """

    def __init__(
        self,
        layers: dict[int, Any],
        options: StatisticsOptions,
        *,
        blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        first_head: int = 0,
    ) -> None:
        heads = {layer.impl.num_heads for layer in layers.values()}
        if len(heads) != 1:
            raise ValueError(f"signals.forward=decode needs layers of as many heads each, not {sorted(heads)}")
        self.options, self.first_head = options, first_head
        self.slots = torch.zeros(blocks, block_size, len(layers), 3, heads.pop(), device=device)
        self.tracks: dict[str, Track] = {}
        self.steps: deque[Any] = deque(maxlen=STEPS)  # that the scheduler has decided, the last one last
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights = torch.empty(0)
        self._now: int | None = None  # the place of the layer that is computed
        if device.type == "cuda":
            self._hear_flash(layers, dtype)
        else:
            self._hear_keys(layers, dtype)

    def note(self, scheduled: Any) -> None:
        """Take in what vLLM's scheduler has decided about the next step (`SchedulerOutput`).

        There are hundreds of requests a step, so it looks at none that has not changed.
        """
        self.steps.append(scheduled)
        for name in scheduled.finished_req_ids:
            self.tracks.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            known = new.req_id in self.tracks  # resumed, for vLLM's second model runner
            self.tracks[new.req_id] = Track(list(new.block_ids[0]), len(new.prompt_token_ids or ()), whole=not known)
        cached = scheduled.scheduled_cached_reqs
        for name in cached.resumed_req_ids:
            self.tracks[name] = replace(self.tracks[name], blocks=[], whole=False)
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks is not None:
                self.tracks[name].blocks += blocks[0]

    def rows(self) -> dict[str, int]:
        """Tokens computed so far of every request of the last steps."""
        found: dict[str, int] = {}
        for step in self.steps:
            cached, new = step.scheduled_cached_reqs, step.scheduled_new_reqs
            before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            before |= {request.req_id: request.num_computed_tokens for request in new}
            found |= {name: count + step.num_scheduled_tokens[name] for name, count in before.items()}
        return found

    def weigh(self, weights: Tensor) -> None:
        """Reduce by these `signal_weights` from now on."""
        heads = slice(self.first_head, self.first_head + self.slots.shape[-1])
        self._weights = weights[..., heads].flatten(1).to(self.slots.device)

    def keep(self, names: Sequence[str]) -> None:
        """Reduce what finished requests have shown, before others get their place; waits for no GPU."""
        rows = self.rows()
        found = {name.partition("-")[0]: name for name in rows}  # vLLM adds a suffix
        whole = [(name, self.tracks[found[name]], rows[found[name]]) for name in names]
        whole = [(name, track, count) for name, track, count in whole if track.whole]
        size = max((count for _, _, count in whole), default=0)
        most = max(1, MOST_ROWS // max(1, size))
        for first in range(0, len(whole), most):
            own, tracks, counts = zip(*whole[first : first + most], strict=True)
            signals, sinks = self._reduce(tracks, counts)
            self._kept |= dict(zip(own, zip(signals, sinks, strict=True), strict=True))

    def _reduce(self, tracks: Sequence[Track], counts: Sequence[int]) -> tuple[Sequence[Tensor], Tensor]:
        """Of each request with so many rows computed [C, n] and, summed over rows, [L, H].

        One gather and one product whatever the number of requests, as hundreds may end at once.
        """
        options, size = self.options, self.slots.shape[1]
        assert options.fai_high is not None
        slots, counted = [], []
        for track, count in zip(tracks, counts, strict=True):
            position = np.arange(track.prompt, count)
            slots.append(np.asarray(track.blocks)[position // size] * size + position % size)
            last = np.minimum(position + options.fai_high, count - 1)
            counted.append(np.maximum(last - position - options.fai_low + 1, 1))  # where there are none, the sum is 0
        lengths = [len(own) for own in slots]
        index, rows = (
            torch.from_numpy(np.concatenate(parts)).to(self.slots.device, non_blocking=True)
            for parts in (slots, counted)
        )
        found = self.slots.flatten(0, 1)[index]  # [sum of n, L, 3, H]
        found[:, :, FAI] /= rows[:, None, None]
        sinks = torch.stack([own.sum(0) for own in found[:, :, SINK_MASS].split(lengths)])
        return (self._weights @ found.flatten(1).T.double()).split(lengths, 1), sinks  # fp32 may be cut to TF32

    def pull(self) -> bytes:
        """What was kept, as safetensors: `name/signals` [C, n] and `name/sink_mass` [L, H]; then forget it."""
        kept, self._kept = self._kept, {}
        sizes = [signals.shape[1] for signals, _ in kept.values()]
        tensors: dict[str, Tensor] = {}
        if kept:
            whole = torch.cat([signals for signals, _ in kept.values()], 1).cpu().split(sizes, 1)  # one wait for all
            sinks = torch.stack([sink for _, sink in kept.values()]).cpu()
            for name, signals, sink in zip(kept, whole, sinks, strict=True):
                tensors |= {f"{name}/signals": signals.contiguous(), f"{name}/sink_mass": sink}
        return save(tensors)

    def _hear_flash(self, layers: dict[int, Any], dtype: torch.dtype) -> None:
        """Have FlashAttention give the log-sum-exp that it has anyway, also within CUDA graphs."""
        from vllm.v1.attention.backends import flash_attn as backend

        others = {type(x.impl).__name__ for x in layers.values() if not isinstance(x.impl, backend.FlashAttentionImpl)}
        if others or next(iter(layers.values())).impl.kv_cache_dtype.startswith("fp8"):
            what = ", ".join(sorted(others)) or "an fp8 KV cache"
            raise ValueError(f"signals.forward=decode reads FlashAttention's own KV cache, but this engine has {what}")
        original = backend.flash_attn_varlen_func
        variants = [variant_of(layer) for layer in layers.values()]

        def listening(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                return original(*args, **kwargs)
            result, lse = original(*args, **kwargs | {"return_softmax_lse": True})
            names = {"q": "q", "keys": "k", "starts": "cu_seqlens_q", "lengths": "seqused_k", "pages": "block_table"}
            step = {own: kwargs[theirs] for own, theirs in names.items()}
            self._add(self._now, variants[self._now], lse=lse, **step)
            return result

        backend.flash_attn_varlen_func = listening
        for place, layer in enumerate(layers.values()):
            layer.impl.forward = self._at(place, layer.impl.forward)
            self._load_kernel(place, layer.impl, variants[place], dtype)

    def _load_kernel(self, place: int, impl: Any, variant: AttentionVariant, dtype: torch.dtype) -> None:
        """On an idle step, as a CUDA graph could not be made meanwhile."""
        made: dict[str, Any] = {"device": self.slots.device, "dtype": dtype}
        q = torch.zeros(1, impl.num_heads, impl.head_size, **made)
        keys = torch.zeros(1, self.slots.shape[1], impl.num_kv_heads, impl.head_size, **made)
        starts, lengths, pages = (self.slots.new_zeros(*shape, dtype=torch.int32) for shape in ((2,), (1,), (1, 1)))
        lse = self.slots.new_zeros(impl.num_heads, 1)
        self._add(place, variant, q=q, keys=keys, starts=starts, lengths=lengths, pages=pages, lse=lse)

    def _at(self, place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._now = place
            try:
                return original(*args, **kwargs)
            finally:
                self._now = None

        return forward

    def _hear_keys(self, layers: dict[int, Any], dtype: torch.dtype) -> None:
        """On a CPU, whose cache is packed for its kernels: keep the keys once more, and compute the rows."""
        for place, layer in enumerate(layers.values()):
            keys = torch.zeros(*self.slots.shape[:2], layer.impl.num_kv_heads, layer.impl.head_size, dtype=dtype)
            layer.impl.forward = self._keeping(keys, place, variant_of(layer), layer.impl.forward)

    def _keeping(
        self, keys: Tensor, place: int, variant: AttentionVariant, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        def forward(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, step: Any, *more: Any, **named: Any
        ) -> Any:
            result = original(layer, query, key, value, cache, step, *more, **named)
            if step is not None:  # warm-up has none
                tokens = step.num_actual_tokens
                keys.flatten(0, 1)[step.slot_mapping[:tokens]] = key[:tokens]
                bounds = {"starts": step.query_start_loc, "lengths": step.seq_lens, "pages": step.block_table}
                self._add(place, variant, q=query[:tokens], keys=keys, **bounds)
            return result

        return forward

    def _add(self, place: int, variant: AttentionVariant, **step: Any) -> None:
        out = self.slots[:, :, place].flatten(0, 1)
        decode_statistics(out, options=self.options, variant=variant, **step)
