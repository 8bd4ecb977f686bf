"""Attention statistics out of any vLLM `LLM`: what each token attends to, without a map and without a second model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load

from rlattn.kernels import AttentionStatistics, StatisticsOptions

if TYPE_CHECKING:
    from vllm import LLM

EXTENSION = "rlattn.rollout.worker.WorkerExtension"


def attention_statistics(
    llm: LLM,
    token_ids: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    response_starts: Sequence[int] | None = None,
    options: StatisticsOptions | None = None,
) -> list[dict[int, AttentionStatistics]]:
    """Statistics of the attention of some layers over whole sequences, from one prefill of them.

    The `llm` must be made with `worker_extension_cls="rlattn.rollout.worker.WorkerExtension"` and have nothing else to
    do. Prefix caching, chunked prefill, compilation and CUDA graphs may be on: cached prefixes are computed again, as
    their queries are not kept. Tensor-parallel workers' heads are put together; pipelines are refused.

    Args:
        llm: vLLM's engine.
        token_ids: sequences, prompt and response each, of at least one token; shorter than `max_model_len` by 1.
        layers: indices of attention layers.
        response_starts: of each sequence, the index of its first response token: only rows from there on are measured
            (a key's FAI counts such rows alone). None measures all rows.
        options: what is measured; None are the paper's settings.

    Returns:
        for each sequence, layer -> statistics, [Hq, N] fp32 on the CPU each.

    Raises:
        ValueError: names what of the above is not so.
        RuntimeError: vLLM did not show every row of a sequence.
    """
    config = llm.llm_engine.vllm_config
    limit = config.model_config.max_model_len - 1
    starts = [0] * len(token_ids) if response_starts is None else list(response_starts)
    if config.parallel_config.worker_extension_cls != EXTENSION:
        raise ValueError(f"this LLM cannot be listened to; make it with LLM(..., worker_extension_cls={EXTENSION!r})")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(f"pipeline_parallel_size={config.parallel_config.pipeline_parallel_size} must be 1")
    if len(starts) != len(token_ids):
        raise ValueError(f"{len(starts)} response_starts for {len(token_ids)} sequences; give one each")
    for place, (ids, start) in enumerate(zip(token_ids, starts, strict=True)):
        if not 1 <= len(ids) <= limit:
            raise ValueError(f"sequence {place} has {len(ids)} tokens; accepted are 1 to {limit} (max_model_len - 1)")
        if not 0 <= start <= len(ids):
            raise ValueError(f"response_starts[{place}]={start} must lie in 0..{len(ids)}")
    if llm.llm_engine.has_unfinished_requests():
        raise ValueError("the LLM has unfinished requests; finish or abort them first")
    settings = asdict(options or StatisticsOptions())
    found: dict[int, dict[int, AttentionStatistics]] = {}
    # A lone last token of a chunked prefill is computed like a decoded one, in a CUDA graph where nothing can be heard:
    # what was not complete is tried again with a token more, which changes no row before it.
    for longer in (0, 1):
        missing = [place for place in range(len(token_ids)) if place not in found]
        if missing:
            spare = {i: min(longer, limit - len(token_ids[i])) for i in missing}
            prompts = {i: [*token_ids[i], *[token_ids[i][-1]] * spare[i]] for i in missing}
            wanted = {i: (len(token_ids[i]), starts[i]) for i in missing}
            found |= _prefill(llm, prompts, wanted, list(layers), settings)
    if len(found) < len(token_ids):
        missing = [place for place in range(len(token_ids)) if place not in found]
        raise RuntimeError(f"vLLM did not show every row of sequences {missing}")
    return [found[place] for place in range(len(token_ids))]


def _prefill(
    llm: LLM,
    prompts: dict[int, list[int]],
    wanted: dict[int, tuple[int, int]],
    layers: list[int],
    options: dict[str, object],
) -> dict[int, dict[int, AttentionStatistics]]:
    """Statistics by place, of those sequences all of whose rows were heard; `wanted` is (tokens, response start)."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, detokenize=False)
    names = {f"rlattn{place}": place for place in prompts}
    bounds = {name: list(wanted[place]) for name, place in names.items()}
    llm.collective_rpc("rlattn_open_capture", args=(layers, options, bounds))
    try:
        for name, place in names.items():
            llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompts[place]), params)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    except BaseException:
        llm.llm_engine.abort_request(list(names))
        raise
    finally:
        workers = [load(part) for part in llm.collective_rpc("rlattn_close_capture")]
    lengths = json.loads(bytes(workers[0]["requests"].tolist()))
    assert all(torch.equal(worker["requests"], workers[0]["requests"]) for worker in workers)  # they see the same rows
    columns = {
        key: torch.cat([worker[key] for worker in workers]).split(list(lengths.values()), 1)  # heads of all workers
        for key in workers[0].keys() - {"requests"}
    }

    def statistics(place: int, layer: int) -> AttentionStatistics:
        found: dict[str, Any] = dict.fromkeys(part.name for part in fields(AttentionStatistics))
        for kind in found:
            if of_all := columns.get(f"{layer}/{kind}"):
                found[kind] = of_all[place]
        return AttentionStatistics(**found)

    return {names[name]: {layer: statistics(i, layer) for layer in layers} for i, name in enumerate(lengths)}
