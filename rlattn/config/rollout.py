"""Generation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rlattn.config.section import Positive, Seconds, Section


class RolloutConfig(Section):
    """Generation by vLLM engines, each a Ray actor."""

    num_engines: Positive = 1
    """Engines; requests are split among them."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions sampled for a prompt: the GRPO group."""
    max_prompt_length: Positive = 512
    """Tokens; a longer prompt is an error, never cut."""
    max_completion_length: Positive = 1024
    """Tokens; a completion that reaches it is marked truncated."""
    oversampling: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Prompts sampled for each that a batch needs: the groups that end soonest are kept, the others cut short. Bounds
    the wait for long completions, and favours prompts with short ones."""
    steps_ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """1 samples and rewards the next step's batch while this one is learned, so by weights one update older; needs
    `algorithm.vllm_importance_sampling_correction`. Pays where engines and policy have devices of their own."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature; log-probs are evaluated at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the trainer's log-probs (full distribution) differ from the sampler's, which is logged."""
    sleep: bool = False
    """Engines that share the policy's GPU (`ray.placement: colocate`) give its memory back while the policy scores and
    learns: their KV cache, and their weights, which come anew."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """KV cache per engine in GiB; None lets vLLM take `gpu_memory_utilization` of its GPU, or 1 GiB on CPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU that vLLM may take; used only on GPUs and without `kv_cache_gib`."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts sooner, generates slower."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to `vllm.LLM` as they are; keys that rlattn sets are refused."""
    weight_transfer: Literal["auto", "object_store"] = "auto"
    """How engines are given new weights. `auto`: on GPUs straight from the policy's memory, read there by an engine on
    the same GPU and broadcast by NCCL to the others; by Ray's object store on CPUs, and where engines share GPUs with
    the policy and sample a step ahead."""
    check_weights: bool = False
    """Compare checksums of every tensor as an engine's workers receive it with the policy's; costs a pass over the
    weights on both sides."""
    start_timeout_s: Seconds = 600
    """Longest wait for an engine to load."""
    silence_timeout_s: Seconds = 180
    """Longest that a sampling engine may say nothing (it does every 5 s): it is then taken for hung, and rebuilt."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row, with no batch finished in between, an engine that died or hung is rebuilt; 0 never."""
    generate_timeout_s: Seconds = 1800
    """Longest wait for one step's completions."""
    weights_timeout_s: Seconds = 300
    """Longest wait for one weight transfer."""
