"""An actor with a vLLM engine, importable where Ray runs it."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save
from torch import Tensor

from rlattn.kernels import AttentionStatistics
from rlattn.rollout.worker_setup import leave_source_tree

LAYERS = [0, 1]


class Scorer:
    """A vLLM engine as a user would make it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        leave_source_tree()
        from vllm import LLM

        self.llm = LLM(**settings)

    def measure(self, token_ids: list[list[int]], **options: Any) -> list[dict[int, AttentionStatistics]]:
        from rlattn.rollout import attention_statistics

        return attention_statistics(self.llm, token_ids, layers=LAYERS, **options)

    def generate(self, token_ids: list[list[int]]) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
        done = self.llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in done]

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """As an engine gets them, in two buckets."""
        self.llm.collective_rpc("rlattn_begin_weights")
        for half in (0, 1):
            bucket = dict(list(state.items())[half::2])
            self.llm.collective_rpc("rlattn_load_bucket", args=(save(bucket),))
        self.llm.collective_rpc("rlattn_finish_weights")
