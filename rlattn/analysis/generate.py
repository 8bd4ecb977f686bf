"""Continuations by transformers' own `generate`, in left-padded batches.

Not vLLM: an engine takes longer to start than a small model takes to answer 70 problems, and here the very weights,
type and device answer whose attention is then measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

MOST_SEQUENCES = 256  # in a batch: more gain nothing where a step is bound by the weights


class Writer:
    """Continues token sequences with one model; greedy, or sampled at a temperature from the full distribution."""

    def __init__(self, model: PreTrainedModel, end: set[int], tokens_per_batch: int) -> None:
        self.model = model
        self.end = sorted(end)
        self.tokens_per_batch = tokens_per_batch
        # A shipped generation config (top_k, repetition penalty) would bend the distribution that is measured.
        pad = self.end[0] if self.end else 0
        model.generation_config = GenerationConfig(eos_token_id=self.end or None, pad_token_id=pad, use_cache=True)

    def batches(self, prefixes: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """Indices of the prefixes, longest first, cut so that a batch's padded tokens stay within bounds."""
        order = sorted(range(len(prefixes)), key=lambda i: (-len(prefixes[i]), i))
        batches: list[list[int]] = []
        for i in order:
            longest = len(prefixes[batches[-1][0]]) + max_tokens if batches else 0
            size = len(batches[-1]) + 1 if batches else 0
            if not batches or size > MOST_SEQUENCES or size * longest > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(i)
        return batches

    @torch.inference_mode()
    def write(
        self,
        prefixes: Sequence[list[int]],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        step: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """The continuation of each prefix, with its end-of-sequence token where that came before `max_tokens`.

        `step` is called `max_tokens` times a batch, as its tokens are made.
        """
        self.model.set_attn_implementation("sdpa")
        generate: Any = self.model.generate  # a mixin that PreTrainedModel's type lacks
        done: list[list[int]] = [[] for _ in prefixes]
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in self.batches(prefixes, max_tokens):
                width = len(prefixes[batch[0]])
                ids = torch.full((len(batch), width), self.model.generation_config.pad_token_id)  # [b, width]
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, width - len(prefixes[i]) :] = torch.tensor(prefixes[i])
                    mask[row, width - len(prefixes[i]) :] = 1
                ticks = _Ticks(step, max_tokens)
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
                out = generate(
                    ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=max_tokens,
                    stopping_criteria=[ticks],
                    **sampling,
                )
                ticks.finish()
                for i, row in zip(batch, out[:, width:].tolist(), strict=True):
                    done[i] = self._until_end(row)
        return done

    def _until_end(self, row: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(row) if token in self.end), len(row) - 1)
        return row[: first + 1]


class _Ticks(StoppingCriteria):
    """Never stops anything; counts tokens for a progress bar."""

    def __init__(self, step: Callable[[], None], total: int) -> None:
        self.step, self.left = step, total

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.left -= 1
        self.step()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        while self.left > 0:
            self.left -= 1
            self.step()
