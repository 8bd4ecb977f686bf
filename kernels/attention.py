"""Padding-free causal attention for any transformers model that uses the attention interface, with capture.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register())
    capture = Capture(capture_layers(model.config), StatisticsOptions(), response_starts)
    model(input_ids=ids[None], position_ids=positions[None], use_cache=False, cu_seqlens=cu_seqlens, capture=capture)

Positions restart in each sequence. Shape legend: [T] tokens of the packed batch, [B] sequences, [Hq] query heads, [Hkv]
key heads, [D] head channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from .capture import Capture
from .ragged import Layout, Offsets, layout_of

NAME = "rlattn"

# torch 2.11 goes by shapes alone, later versions want to be told.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# Extras of some models that change the attention map; ignoring one would train another model than the engine serves.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache")


def register() -> str:
    """Make the implementation known to transformers, once or more; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface  # seconds: only where a model is made

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
    return NAME


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Offsets, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention within each sequence of a packed batch; differentiable.

    bf16 and fp16 on CUDA run torch's variable-length flash attention; everything else runs SDPA on sequences padded to
    groups of similar length.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D]; Hkv divides Hq.
        v: [T, Hkv, D].
        cu_seqlens: [B+1] integers on the CPU, sequence b is tokens cu_seqlens[b] to cu_seqlens[b+1].
        scale: factor on q·k.
        sliding_window: key s is visible to t iff t - s < sliding_window; None means every earlier key.

    Returns:
        [T, Hq, D], in q's type.
    """
    return _attend(q, k, v, cu_seqlens, scale, sliding_window, with_lse=False)[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Offsets, scale: float, sliding_window: int | None, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`packed_attention` and, if wanted and where the kernel has it, the rows' log-sum-exp [Hq, T] fp32, detached."""
    layout = layout_of(cu_seqlens, len(q), q.device)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        cu, longest = layout.cu_seqlens, layout.max_length
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        aux = AuxRequest(lse=True) if with_lse else None
        out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, return_aux=aux, **_GQA)
        if isinstance(out, tuple):
            return out[0], out[1].detach()
        return out, None
    return _padded_attention(q, k, v, layout, scale, sliding_window), None


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, sliding_window: int | None
) -> Tensor:
    native_gqa = q.device.type == "cpu"  # faster there; CUDA's fp32 kernels lack it and would fall back to whole maps
    if not native_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outputs = []
    for group in zip(layout.pad(q), layout.pad(k), layout.pad(v), strict=True):
        n = group[0].shape[1]
        mask = None
        if sliding_window is not None and sliding_window < n:
            t = torch.arange(n, device=q.device)
            distance = t[:, None] - t
            mask = (distance >= 0) & (distance < sliding_window)
        queries, keys, values = (x.transpose(1, 2) for x in group)  # [b, H, n, D]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=native_gqa
        )
        outputs.append(out.transpose(1, 2))
    return layout.unpad(outputs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Offsets | None = None,
    capture: Capture | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, T, D], key and value [1, Hkv, T, D] to ([1, T, Hq, D], None).

    `cu_seqlens` and `capture` are passed to the model's forward, which hands them down.

    Raises:
        ValueError: no cu_seqlens, a padded or cached batch, dropout, or an attention variant that is not supported.
    """
    if cu_seqlens is None:
        raise ValueError(f"attention {NAME!r} needs cu_seqlens: pass model(..., cu_seqlens=[B+1] token offsets)")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention {NAME!r} takes one packed row and use_cache=False; got a batch of {query.shape[0]} with "
            f"{query.shape[2]} queries and {key.shape[2]} keys"
        )
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes no attention_mask; cu_seqlens describes the packed batch")
    if dropout:
        raise ValueError(f"attention {NAME!r} does not support dropout={dropout}; set attention_dropout to 0")
    scale, sliding_window = map_options(module, query.shape[-1], kwargs | {"scaling": scaling})
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    layer: Any = getattr(module, "layer_idx", None)  # nn.Module types every attribute as Tensor | Module
    with_lse = capture is not None and capture.takes_lse(layer)
    out, lse = _attend(q, k, v, cu_seqlens, scale, sliding_window, with_lse=with_lse)
    if capture is not None:
        capture.record(layer, q, k, cu_seqlens, scale=scale, sliding_window=sliding_window, lse=lse)
    return out[None], None


def map_options(module: nn.Module, head_dim: int, kwargs: Mapping[str, Any]) -> tuple[float, int | None]:
    """Scale and sliding window of a layer's attention map, from the keywords that its attention function is given.

    Raises:
        ValueError: an attention variant that is not supported.
    """
    config = getattr(module, "config", None)
    extras = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    extras += ["attention_chunk_size"] if getattr(config, "attention_chunk_size", None) is not None else []
    causal = kwargs.get("is_causal")
    extras += [] if (getattr(module, "is_causal", True) if causal is None else causal) else ["is_causal=False"]
    if extras:
        raise ValueError(f"attention {NAME!r} does not support {', '.join(extras)} of {type(module).__name__}")
    scaling = kwargs.get("scaling")
    sliding_window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    return head_dim**-0.5 if scaling is None else scaling, sliding_window


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """transformers' mask function: the packed layout needs none.

    Raises:
        ValueError: the caller gave a padding mask, which would be ignored.
    """
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes no attention_mask; pass a packed batch and cu_seqlens")
