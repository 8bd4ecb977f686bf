"""Attention statistics inside a vLLM worker, from the queries and keys of a prefill.

The attention of chosen layers is listened to while a capture is open: `impl.forward` is looked up at every call, also
by compiled models, so nothing is compiled again and generation keeps its CUDA graphs.

[N] tokens of a sequence, [Hq] query heads of this worker, [D] head channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rlattn.kernels import AttentionStatistics, StatisticsOptions, attention_statistics
from rlattn.kernels.statistics import AttentionVariant


@dataclass
class Heard:
    """What one layer has shown of one sequence: consecutive rows of its queries and keys."""

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    rows: int = 0


class Listener:
    """Gathers the rows of wanted sequences, and reduces a layer's as soon as it has them all.

    Args:
        layers: index -> vLLM's attention layer.
        options: what is measured.
        wanted: request name -> (its tokens, index of its first response token).
        names: the requests of the step that is computed, in the order of its rows.
    """

    def __init__(
        self,
        layers: dict[int, Any],
        options: StatisticsOptions,
        wanted: dict[str, tuple[int, int]],
        names: Callable[[], Sequence[str]],
    ) -> None:
        self.layers, self.options, self.wanted, self.names = layers, options, wanted, names
        self.heard: dict[tuple[str, int], Heard] = {}
        self.done: dict[tuple[str, int], AttentionStatistics] = {}
        self._step: tuple[Any, list[tuple[str, int, int, int]]] = (None, [])
        self._originals = {index: layer.impl.forward for index, layer in layers.items()}
        for index, layer in layers.items():
            layer.impl.forward = self._listening(index, layer.impl.forward)

    def close(self) -> None:
        """Leave the layers as they were."""
        for index, original in self._originals.items():
            self.layers[index].impl.forward = original

    def _listening(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Any,
            metadata: Any,
            *rest: Any,
            **named: Any,
        ) -> Any:
            result = original(layer, query, key, value, kv_cache, metadata, *rest, **named)
            if metadata is not None:  # warm-up has none
                self._hear(index, query, key, metadata)
            return result

        return forward

    def _hear(self, index: int, query: Tensor, key: Tensor, metadata: Any) -> None:
        for name, start, end, position in self._rows(metadata):
            if (name, index) in self.done:
                continue
            heard = self.heard.setdefault((name, index), Heard())
            if position == 0 and heard.rows:  # preempted: vLLM computes it again
                heard = self.heard[name, index] = Heard()
            if position != heard.rows:
                continue  # rows are missing: never complete, and said so in the end
            heard.queries.append(query[start:end].clone())
            heard.keys.append(key[start:end].clone())
            heard.rows += end - start
            if heard.rows >= self.wanted[name][0]:
                self.done[name, index] = self._reduce(name, index, self.heard.pop((name, index)))

    def _rows(self, metadata: Any) -> list[tuple[str, int, int, int]]:
        """(request, first row, row after its last, position of the first) of the wanted requests of this step."""
        if self._step[0] is not metadata:
            bounds, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            found = []
            for i, internal in enumerate(self.names()):
                name = internal if internal in self.wanted else internal.rpartition("-")[0]  # vLLM adds a suffix
                start, end = bounds[i], bounds[i + 1]
                if name in self.wanted and end > start:
                    found.append((name, start, end, lengths[i] - (end - start)))
            self._step = metadata, found
        return self._step[1]

    def _reduce(self, name: str, index: int, heard: Heard) -> AttentionStatistics:
        tokens, response_start = self.wanted[name]
        layer = self.layers[index]
        q, k = (torch.cat(parts)[:tokens] for parts in (heard.queries, heard.keys))  # [N, Hq, D], [N, Hkv, D]
        return attention_statistics(
            q,
            k,
            [0, tokens],
            [response_start],
            options=self.options,
            **vars(variant_of(layer)),
        )


class CaptureExtension:
    """What a vLLM worker gains: three calls around the steps in which attention is listened to."""

    vllm_config: Any
    model_runner: Any

    def rlattn_open_capture(self, layers: list[int], options: dict[str, Any], wanted: dict[str, list[int]]) -> None:
        """Listen to `layers` for the requests `wanted`, name -> (tokens, response start).

        Raises:
            ValueError: this model lacks such a layer, or its attention keeps no keys of its own.
        """
        chosen = attention_layers(self.vllm_config.compilation_config.static_forward_context, layers)
        bounds = {name: (tokens, start) for name, (tokens, start) in wanted.items()}
        self._rlattn_listener = Listener(chosen, StatisticsOptions(**options), bounds, self._rlattn_names())

    def rlattn_close_capture(self) -> bytes:
        """Stop listening; returns what was measured as safetensors, `layer/statistic` -> [Hq, t] fp32.

        t are the tokens of the requests all of whose rows passed, one after the other; `requests` has their names and
        lengths, as JSON in bytes. Few large tensors, since each takes its time to be copied and packed.
        """
        listener = self._rlattn_listener
        listener.close()
        del self._rlattn_listener
        done, layers = listener.done, listener.layers
        whole = [name for name in listener.wanted if all((name, index) in done for index in layers)]
        about = json.dumps({name: listener.wanted[name][0] for name in whole})
        tensors = {"requests": torch.tensor(list(about.encode()), dtype=torch.uint8)}
        for index in layers if whole else ():
            for part in fields(AttentionStatistics):
                values = [getattr(done[name, index], part.name) for name in whole]
                if values[0] is not None:
                    tensors[f"{index}/{part.name}"] = torch.cat(values, 1).cpu()
        return save(tensors)

    def _rlattn_names(self) -> Callable[[], Sequence[str]]:
        """The requests of the current step in row order, which vLLM's two model runners keep in two places."""
        runner = self.model_runner
        if hasattr(runner, "input_batch"):
            return lambda: runner.input_batch.req_ids[: runner.input_batch.num_reqs]
        if not hasattr(runner, "_rlattn_batch"):
            prepare = runner.prepare_inputs

            def watched(*args: Any, **kwargs: Any) -> Any:
                runner._rlattn_batch = prepare(*args, **kwargs)
                return runner._rlattn_batch

            runner._rlattn_batch, runner.prepare_inputs = None, watched
        return lambda: runner._rlattn_batch.req_ids


def variant_of(layer: Any) -> AttentionVariant:
    """How vLLM's attention layer makes its map."""
    impl = layer.impl
    softcap = getattr(impl, "logits_soft_cap", None) or None
    return AttentionVariant(impl.scale, layer.sliding_window, softcap, getattr(impl, "sinks", None))


def attention_layers(context: dict[str, Any], wanted: Sequence[int]) -> dict[int, Any]:
    """vLLM's attention layers of some indices.

    Raises:
        ValueError: see `CaptureExtension.rlattn_open_capture`.
    """
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    found = {extract_layer_index(name): layer for name, layer in context.items() if isinstance(layer, Attention)}
    missing = [index for index in wanted if index not in found]
    if missing:
        raise ValueError(f"layers {missing} have no attention to listen to; those that have: {sorted(found)}")
    for index in wanted:
        for name in ("kv_sharing_target_layer_name", "alibi_slopes"):
            if any(getattr(owner, name, None) is not None for owner in (found[index], found[index].impl)):
                raise ValueError(f"layer {index} cannot be measured: its attention has {name}")
    return {index: found[index] for index in wanted}
