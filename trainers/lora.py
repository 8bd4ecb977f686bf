"""Low-rank adapters by PEFT (arXiv 2106.09685): what learns, and the whole weights that engines are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlattn.config import ConfigError, LoRAConfig

ADAPTER = "default"
Entry = tuple[str, Sequence[Tensor], Callable[[], Tensor]]
"""A weight's Hugging Face name, the parameters it is made of, and what makes it once these are whole."""


def adapted(lm: PreTrainedModel, lora: LoRAConfig, seed: int) -> PeftModel:
    """`lm` with frozen weights and fresh adapters, put into it; equal on every rank for equal seeds.

    Raises:
        ConfigError: `target_modules` names no layer of the model.
    """
    torch.manual_seed(seed)
    settings = LoraConfig(task_type="CAUSAL_LM", **lora.model_dump(exclude={"sync"}))
    try:
        return get_peft_model(lm, settings)
    except ValueError as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"`policy.lora.target_modules` = {lora.target_modules!r}: {message}") from None


def entries(lm: nn.Module) -> Iterator[Entry]:
    """Every weight of the model as it would be without adapters, theirs added in fp32 to the one they sit beside."""
    layers = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in lm.named_parameters():
        prefix, found, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if not found:
            yield name, [parameter], parameter.detach
        elif rest == "weight":
            layer = layers[prefix]
            yield f"{prefix}.weight", [parameter, *_pair(layer)], _merged(parameter, layer)
        else:
            yield f"{prefix}.{rest}", [parameter], parameter.detach


def _pair(layer: LoraLayer) -> list[Tensor]:
    return [cast("nn.Linear", half[ADAPTER]).weight for half in (layer.lora_A, layer.lora_B)]


def _merged(parameter: nn.Parameter, layer: LoraLayer) -> Callable[[], Tensor]:
    def merge() -> Tensor:
        a, b = (weight.detach().float() for weight in _pair(layer))
        return (parameter.detach().float() + layer.scaling[ADAPTER] * (b @ a)).to(parameter.dtype)

    return merge
