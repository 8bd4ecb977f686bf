"""Mixed into vLLM's worker (`worker_extension_cls`): receives weights, listens to attention.

vLLM calls these by name, in every worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlattn.rollout.capture import CaptureExtension
from rlattn.rollout.checksums import check, checksums


class WeightsExtension:
    """A weight update in three calls, so that a model arrives bucket by bucket.

    It is vLLM's `reload_weights` cut at its seams: one bucket of the model, not all of it, exists twice at a time.
    """

    vllm_config: Any
    model_config: Any
    model_runner: Any
    weight_transfer_engine: Any
    start_weight_update: Any
    update_weights: Any
    finish_weight_update: Any

    def rlattn_begin_weights(self) -> None:
        """Make the model ready to be loaded in checkpoint format."""
        model = self.model_runner.get_model()
        self._rlattn_missing = {name for name, _ in model.named_parameters()}
        self._rlattn_expected: dict[str, str] | None = None
        self._rlattn_device = next(model.parameters()).device
        if self.weight_transfer_engine is not None:
            model.load_weights = self._rlattn_load  # what vLLM's interface calls with each part that it receives
            self.start_weight_update()
            return
        with torch.device(self._rlattn_device), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def rlattn_load_bucket(self, bucket: bytes, expected: dict[str, str] | None = None) -> None:
        """Load some full, unsharded tensors under their Hugging Face names (`bucket` is safetensors bytes).

        Raises:
            ValueError: they do not have the `expected` checksums; names those that do not.
        """
        self._rlattn_expected = expected
        with torch.device(self._rlattn_device), set_current_vllm_config(self.vllm_config):
            self._rlattn_load(load(bucket).items())

    def rlattn_load_shared(self, info: dict[str, Any], expected: dict[str, str] | None = None) -> None:
        """Load what vLLM's weight-transfer interface receives by `info` (its `update_info`).

        Raises:
            ValueError: as `rlattn_load_bucket`.
        """
        self._rlattn_expected = expected
        self.update_weights(info)

    def _rlattn_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        tensors = dict(weights)
        if self._rlattn_expected is not None:
            own = {name: checksum for name, checksum in self._rlattn_expected.items() if name in tensors}
            check("this worker", own, checksums({name: tensor.cpu() for name, tensor in tensors.items()}))
        model = self.model_runner.get_model()
        loaded = type(model).load_weights(model, iter(tensors.items()))
        self._rlattn_missing = set() if loaded is None else self._rlattn_missing - loaded

    def rlattn_finish_weights(self) -> None:
        """Process what was loaded into the kernels' layout.

        Raises:
            ValueError: names the parameters that no bucket held; they keep their old values.
        """
        model = self.model_runner.get_model()
        if self.weight_transfer_engine is not None:
            self.finish_weight_update()
        else:
            with torch.device(self._rlattn_device), set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(model, self.model_config)
        tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
        if tied and self._rlattn_device.type == "cpu":
            # Reloading packs the embedding for lookup only; without this the tied lm_head keeps the old weights.
            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        if self._rlattn_missing:
            names = sorted(self._rlattn_missing)
            raise ValueError(f"{len(names)} parameters were in no bucket of the update: {', '.join(names[:5])}")


class WorkerExtension(WeightsExtension, CaptureExtension):
    """All that rlattn adds to a vLLM worker; give it as `worker_extension_cls`."""
