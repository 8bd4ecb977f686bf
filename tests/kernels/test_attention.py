"""The registered attention implementation and capture, inside real transformers models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlattn import kernels
from rlattn.kernels import Capture, StatisticsOptions, capture_layers, packed_attention, register, spaced_layers
from rlattn.kernels.reference import map_statistics

MODELS = ["qwen3", "qwen2", "llama"]
LENGTHS = [7, 31, 1, 45, 30, 12]
OPTIONS = StatisticsOptions(waad_window=4, fai_low=3, fai_high=11)


def starts_of(cu_seqlens):
    """A third of each sequence is prompt."""
    return [
        begin + (end - begin) // 3 for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)
    ]


def alone(batch):
    """The keyword arguments of each sequence by itself, with its token slice."""
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        part = slice(begin, end)
        yield part, {"input_ids": batch["input_ids"][:, part], "position_ids": batch["position_ids"][:, part]}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [OPTIONS, StatisticsOptions(fai_high=None, sink_tokens=2)], ids=repr)
def test_statistics_match_eager_maps(tiny_model, token_batch, kind, options):
    """Statistics captured in a packed forward equal those of each sequence's own eager maps."""
    model, eager = tiny_model(kind), tiny_model(kind, "eager")
    batch = token_batch(LENGTHS)
    capture = Capture(range(4), options, starts_of(batch["cu_seqlens"]))
    with torch.no_grad():
        model(**batch, capture=capture)
    assert sorted(capture.statistics) == [0, 1, 2, 3]
    for (part, inputs), start in zip(alone(batch), capture.response_starts, strict=True):
        with torch.no_grad():
            maps = eager(**inputs, output_attentions=True, use_cache=False).attentions
        single = Capture(range(4), options, [start - part.start])
        with torch.no_grad():
            model(**inputs, use_cache=False, cu_seqlens=[0, part.stop - part.start], capture=single)
        for layer, layer_maps in enumerate(maps):
            expected = map_statistics(layer_maps[0].double(), start - part.start, options)
            for name, values in expected.items():
                for actual in (
                    getattr(capture.statistics[layer], name)[:, part],
                    getattr(single.statistics[layer], name),
                ):
                    torch.testing.assert_close(actual.double(), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_packing_changes_nothing(tiny_model, token_batch, kind):
    """Logits and gradients of a packed batch equal those of transformers' own attention, a sequence at a time."""
    model, plain = tiny_model(kind).double(), tiny_model(kind, "sdpa").double()
    batch = token_batch(LENGTHS)
    weights = torch.randn(sum(LENGTHS), 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model(**batch).logits[0]
    (logits * weights).sum().backward()
    for part, inputs in alone(batch):
        expected = plain(**inputs, use_cache=False).logits[0]
        torch.testing.assert_close(logits[part], expected, rtol=1e-9, atol=1e-9)
        (expected * weights[part]).sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-8, atol=1e-8)


def test_order_of_sequences_changes_nothing(tiny_model, token_batch):
    model, batch = tiny_model(), token_batch(LENGTHS)
    order = [3, 0, 5, 2, 1, 4]
    tokens = torch.cat([torch.arange(sum(LENGTHS))[part] for part in [list(alone(batch))[i][0] for i in order]])
    shuffled = {name: batch[name][:, tokens] for name in ("input_ids", "position_ids")}
    cu = torch.tensor([LENGTHS[i] for i in order]).cumsum(0)
    shuffled |= {"cu_seqlens": torch.cat([cu.new_zeros(1), cu]), "use_cache": False}
    first = Capture([2], OPTIONS, starts_of(batch["cu_seqlens"]))
    second = Capture([2], OPTIONS, starts_of(shuffled["cu_seqlens"]))
    with torch.no_grad():
        logits, other = model(**batch, capture=first).logits[0], model(**shuffled, capture=second).logits[0]
    torch.testing.assert_close(other, logits[tokens], rtol=1e-4, atol=1e-4)
    for name, values in vars(first.statistics[2]).items():
        torch.testing.assert_close(getattr(second.statistics[2], name), values[:, tokens], rtol=1e-5, atol=1e-5)


def test_sliding_window_layers(tiny_model, token_batch):
    """Layers with a window see just that; full layers of the same model see everything."""
    window = {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    model, eager = tiny_model("qwen3", **window), tiny_model("qwen3", "eager", **window)
    batch = token_batch(LENGTHS)
    capture = Capture(range(4), OPTIONS, starts_of(batch["cu_seqlens"]))
    with torch.no_grad():
        logits = model(**batch, capture=capture).logits[0]
    for (part, inputs), start in zip(alone(batch), capture.response_starts, strict=True):
        with torch.no_grad():
            expected = eager(**inputs, output_attentions=True, use_cache=False)
        torch.testing.assert_close(logits[part], expected.logits[0], rtol=1e-4, atol=1e-4)
        for layer, maps in enumerate(expected.attentions):
            for name, values in map_statistics(maps[0].double(), start - part.start, OPTIONS).items():
                actual = getattr(capture.statistics[layer], name)[:, part].double()
                torch.testing.assert_close(actual, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, token_batch, monkeypatch, kind, reentrant):
    """Recomputation gives the same gradients and is not measured again."""
    batch = token_batch(LENGTHS)
    calls = []
    measure = kernels.capture.attention_statistics
    monkeypatch.setattr(kernels.capture, "attention_statistics", lambda *a, **kw: calls.append(1) or measure(*a, **kw))
    results = []
    for checkpointing in (False, True):
        model = tiny_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        capture = Capture([1, 2], OPTIONS, starts_of(batch["cu_seqlens"]))
        model(**batch, capture=capture).logits.square().mean().backward()
        assert len(calls) == 2
        calls.clear()
        results.append((gradients(model), capture.statistics))
    (plain, statistics), (recomputed, again) = results
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
    assert sorted(again) == [1, 2]
    assert all(torch.equal(again[layer].fai, statistics[layer].fai) for layer in (1, 2))


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_attention(packed, window, dtype):
    batch = packed([3, 40, 17, 39, 1], dtype=dtype)
    q, k, v = (x.requires_grad_() for x in (batch.q, batch.k, batch.v))
    actual = packed_attention(q, k, v, batch.cu_seqlens, scale=0.3, sliding_window=window)
    assert actual.dtype == dtype
    expected = []
    for begin, end in batch.bounds:
        queries, keys, values = (x[begin:end].transpose(0, 1).double() for x in (q, k, v))
        keys, values = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
        t = torch.arange(end - begin)
        visible = (t[:, None] >= t) & (t[:, None] - t < (window or end))
        expected.append(F.scaled_dot_product_attention(queries, keys, values, visible, scale=0.3).transpose(0, 1))
    expected = torch.cat(expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    got = torch.autograd.grad((actual.double() * weights).sum(), (q, k, v))
    want = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), e.double(), **tolerance)


def test_layout_made_in_inference_mode_serves_training(packed):
    """The cached layout of a scoring pass is used by the update that follows."""
    batch = packed([13, 14, 29])
    arguments = (batch.q.requires_grad_(), batch.k, batch.v, batch.cu_seqlens)
    with torch.inference_mode():
        packed_attention(*arguments, scale=0.3)
    packed_attention(*arguments, scale=0.3).sum().backward()
    assert batch.q.grad.abs().sum() > 0


def test_what_cannot_be_honoured_is_refused(tiny_model, token_batch):
    model, batch = tiny_model(), token_batch([5, 6])
    without = {name: value for name, value in batch.items() if name != "cu_seqlens"}
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        model(**without)
    with pytest.raises(ValueError, match=r"rise strictly from 0 to the 11 tokens of the batch, got \[0, 5, 12\]"):
        model(**without, cu_seqlens=[0, 5, 12])
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(**batch, attention_mask=torch.ones(1, 11))
    with pytest.raises(ValueError, match="got a batch of 2"):
        model(input_ids=torch.zeros(2, 11, dtype=torch.int64), cu_seqlens=[0, 11], use_cache=False)
    with pytest.raises(ValueError, match="does not support softcap, s_aux of Qwen3Attention"):
        model(**batch, softcap=30.0, s_aux=torch.zeros(6))
    with pytest.raises(ValueError, match=r"does not support dropout=0\.1"):
        tiny_model(attention_dropout=0.1).train()(**batch)


def test_capture_serves_one_forward(tiny_model, token_batch):
    model, capture = tiny_model(), Capture([1], OPTIONS, [2, 7])
    model(**token_batch([5, 6]), capture=capture)
    with pytest.raises(ValueError, match="a Capture serves one forward"):
        model(**token_batch([6, 5]), capture=capture)


def test_register_is_idempotent():
    assert register() == register() == "rlattn"
    assert ALL_ATTENTION_FUNCTIONS["rlattn"] is kernels.attention.attention_forward


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [
        (36, 5, [12, 15, 18, 21, 24]),
        (28, 5, [9, 11, 14, 16, 18]),
        (6, 5, [2, 3, 4]),
        (6, 1, [3]),
        (1, 5, [0]),
        (2, 5, [0, 1]),
        (64, 2, [21, 42]),
    ],
)
def test_middle_layers(num_layers, count, expected):
    assert spaced_layers(num_layers, count) == spaced_layers(num_layers, count, "middle") == expected


@pytest.mark.parametrize(
    ("num_layers", "count", "layer_range", "expected"),
    [
        (36, 5, "bottom", [0, 3, 6, 8, 11]),
        (36, 5, "top", [25, 28, 30, 32, 35]),
        (36, 5, "all", [0, 9, 18, 26, 35]),
        (36, None, "all", list(range(36))),
        (36, None, "middle", list(range(12, 25))),
        (6, 99, "top", [5]),
        (2, 5, "bottom", [0]),
        (2, 5, "top", [1]),
        (1, None, "top", [0]),
    ],
)
def test_other_ranges(num_layers, count, layer_range, expected):
    assert spaced_layers(num_layers, count, layer_range) == expected


@pytest.mark.parametrize("num_layers", range(3, 40))
def test_the_ranges_are_the_whole_model(num_layers):
    parts = [layer for name in ("bottom", "middle", "top") for layer in spaced_layers(num_layers, None, name)]
    assert sorted(set(parts)) == spaced_layers(num_layers, None, "all")
    assert num_layers == 3 or len(parts) == num_layers  # of three layers, the middle reaches to the last


def test_capture_layers_counts_full_attention_only():
    assert capture_layers(LlamaConfig(num_hidden_layers=36)) == [12, 15, 18, 21, 24]
    types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 6
    hybrid = Qwen3Config(num_hidden_layers=24, layer_types=types)
    assert capture_layers(hybrid) == [11, 15, 19]  # the 2nd to 4th of full layers 3, 7, 11, 15, 19, 23
    with pytest.raises(ValueError, match="no full_attention layer to capture"):
        capture_layers(Qwen3Config(num_hidden_layers=2, layer_types=["linear_attention"] * 2))
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        spaced_layers(6, 0)
    with pytest.raises(ValueError, match="layer_range='upper' must be one of middle, bottom, top, all"):
        spaced_layers(6, 2, "upper")


def test_layers_by_number():
    types = ["linear_attention", "full_attention"] * 3
    hybrid = Qwen3Config(num_hidden_layers=6, layer_types=types)
    assert capture_layers(hybrid, [1, 5]) == [1, 5]
    assert capture_layers(hybrid, None, "all") == [1, 3, 5]
    assert capture_layers(hybrid, 5, "top") == [5]
    assert capture_layers(LlamaConfig(num_hidden_layers=4), [0, 3]) == [0, 3]
    for layers, refused in (([1, 2, 6], "[2, 6]"), ([-1], "[-1]"), ([], "[]")):
        message = re.escape(f"layers {refused} cannot be captured; the model's full_attention layers: [1, 3, 5]")
        with pytest.raises(ValueError, match=message):
            capture_layers(hybrid, layers)


def test_refuses_the_name_kernels():
    root = Path(kernels.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import kernels"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, cwd=os.sep, check=False
    )
    assert run.returncode == 1
    assert "must not be imported as `kernels`" in run.stderr
