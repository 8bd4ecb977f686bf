"""vLLM's worker with a `SlotStore`; give it as `worker_cls`, and `SECTION` of `additional_config` as its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.platforms import current_platform

from rlattn.kernels import StatisticsOptions
from rlattn.rollout.capture import attention_layers
from rlattn.rollout.decoding import SECTION, SlotStore

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker


class DecodingWorker(Worker):
    """Listens before CUDA graphs are made, so that they hold what listening launches."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, and the store beside it.

        Raises:
            ValueError: the model's layers do not share one kind of cache, or see `SlotStore`.
        """
        super().initialize_from_config(kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(f"signals.forward=decode needs a model with one kind of KV cache; this has {len(groups)}")
        settings: dict[str, Any] = self.vllm_config.additional_config[SECTION]  # type: ignore[index]
        assert self.device is not None
        assert isinstance(self.model_config.dtype, torch.dtype)
        chosen = attention_layers(self.vllm_config.compilation_config.static_forward_context, settings["layers"])
        self.rlattn_store = SlotStore(
            chosen,
            StatisticsOptions(**settings["options"]),
            blocks=kv_cache_config.num_blocks,
            block_size=groups[0].kv_cache_spec.block_size,
            device=self.device,
            dtype=self.model_config.dtype,
            first_head=get_tensor_model_parallel_rank() * next(iter(chosen.values())).impl.num_heads,
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step, after noting whose it is."""
        self.rlattn_store.note(scheduler_output)
        return super().execute_model(scheduler_output)

    def rlattn_weigh(self, weights: list[Any]) -> None:
        """See `SlotStore.weigh`; nested lists, as vLLM passes nothing but plain values safely."""
        self.rlattn_store.weigh(torch.tensor(weights, dtype=torch.float64))

    def rlattn_keep(self, names: list[str]) -> None:
        """See `SlotStore.keep`."""
        self.rlattn_store.keep(names)

    def rlattn_pull(self) -> bytes:
        """See `SlotStore.pull`."""
        return self.rlattn_store.pull()
