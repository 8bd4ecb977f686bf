"""The policy as DeepSpeed sees it: packed tokens in, log-probs of response tokens out, attention captured on the way.

[t] tokens of a micro-batch, [n] response tokens among them, [d] width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlattn.config import ConfigError, ModelConfig, SignalsConfig
from rlattn.kernels import Capture, capture_layers, register
from rlattn.packing import MicroBatch
from rlattn.trainers.head import response_logps
from rlattn.trainers.norms import fuse_norms


class PolicyModel(nn.Module):
    """A Hugging Face causal LM whose forward gives log-probs and entropy of the completion tokens of a packed batch."""

    def __init__(self, lm: PreTrainedModel, temperature: float, *, learn_entropy: bool = False) -> None:
        super().__init__()
        self.learn_entropy = learn_entropy
        self.lm = lm
        self.temperature = temperature

    def forward(
        self, micro: MicroBatch, *, capture: Capture | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [n] fp32 (differentiable) and entropy [n] fp32, at the sampling temperature.

        The entropy is differentiable where the model was made to `learn_entropy`.
        """
        device = self.lm.device
        rows = micro.response_indices
        hidden = self.lm.get_decoder()(
            input_ids=micro.token_ids[None].to(device),  # [1, t]
            position_ids=micro.position_ids[None].to(device),  # [1, t]
            use_cache=False,
            cu_seqlens=micro.cu_seqlens,
            capture=capture,
        ).last_hidden_state[0]  # [t, d]
        logps, entropy = response_logps(
            hidden[(rows - 1).to(device)],  # [n, d]; the logits at t-1 draw token t
            self.lm.get_output_embeddings(),
            micro.token_ids[rows].to(device),
            temperature=self.temperature,
            num_chunks=micro.chunks,
            with_entropy=with_entropy,
        )
        # The entropy's graph would keep what the backward recomputes of every chunk, [n, V] in all, while it lives.
        return logps, entropy if entropy is None or self.learn_entropy else entropy.detach()


def load_model(config: ModelConfig, path: str) -> PreTrainedModel:
    """The causal LM at `path`, in `config.dtype`, with rlattn's attention.

    Raises:
        ConfigError: no such model, or one whose logits are transformed in a way that log-probs here do not follow.
    """
    try:
        shape = AutoConfig.from_pretrained(path)
        check_model(shape)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), attn_implementation=register()
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"`model.path` = {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    fuse_norms(model)
    return model


def captured_layers(signals: SignalsConfig, shape: PretrainedConfig) -> list[int]:
    """The layers that `signals` captures of a model of this shape.

    Raises:
        ConfigError: the model lacks them.
    """
    try:
        return capture_layers(shape, signals.layers, signals.layer_range)
    except ValueError as error:
        raise ConfigError(f"`signals.layers` = {signals.layers}: {error}") from None


def out_of_reach(path: str, error: Exception) -> ConfigError:
    """What to say where the first thing that is read of a model cannot be read."""
    return ConfigError(
        f"`model.path` = {path!r} is neither a folder with a Hugging Face model nor a hub model within reach "
        f"({str(error).splitlines()[0]})"
    )


def check_model(shape: object) -> None:
    """Refuse models whose final logits are not plainly `lm_head(hidden)`."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(shape, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"`model.path`: models with `{name}` are not supported yet; use a Qwen or Llama shape")
