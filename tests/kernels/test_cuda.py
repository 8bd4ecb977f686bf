"""The same on a GPU: flash attention by cu_seqlens, and the statistics by the compiled kernels and by torch."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from rlattn.kernels import Capture, StatisticsOptions, attention_statistics, packed_attention
from rlattn.kernels.bounds import bounds_of
from rlattn.kernels.reference import dense_statistics
from rlattn.kernels.statistics import AttentionVariant
from tests.kernels.decoding import assert_decoded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BANDED = ["lse", "waad", "fai", "sink_mass"]
LENGTHS = [5, 333, 1, 150, 1025]


@pytest.mark.parametrize("window", [None, 2, 40])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004), (torch.float32, 1e-3)]
)
def test_attention_and_gradients(packed, window, dtype, tolerance):
    """Against the fp64 path on the CPU, from the same inputs."""
    batch = packed(LENGTHS, heads=8, kv_heads=2, dim=64, dtype=dtype)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        q, k, v = (x.detach().to(device, kind).requires_grad_() for x in (batch.q, batch.k, batch.v))
        out = packed_attention(q, k, v, batch.cu_seqlens, scale=0.125, sliding_window=window)
        out.double().square().sum().backward()
        results.append([x.detach().double().cpu() for x in (out, q.grad, k.grad, v.grad)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()


def relative_errors(actual, expected, names=None):
    for name in names or [field.name for field in fields(expected)]:
        reference = getattr(expected, name).double()
        yield name, ((getattr(actual, name).double() - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture
def poisoned_outputs():
    """torch fills new tensors with NaN, so that an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "variant", [{}, {"sliding_window": 40}, {"softcap": 5.0, "sinks": torch.linspace(-4.0, 4.0, 8)}], ids=str
)
@pytest.mark.parametrize("options", [StatisticsOptions(), StatisticsOptions(fai_high=None, sink_tokens=3)], ids=repr)
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 32), (2, 64), (1, 128), (4, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("backend", "tolerance"), [("triton", 1e-5), ("torch", 1e-6)])
def test_statistics(packed, poisoned_outputs, backend, tolerance, dtype, kv_heads, dim, options, variant):
    batch = packed(LENGTHS, heads=8, kv_heads=kv_heads, dim=dim, dtype=dtype)
    variant = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in variant.items()}
    arguments = (batch.q.cuda(), batch.k.cuda(), batch.cu_seqlens, batch.response_starts)
    shared = {"scale": dim**-0.5, "options": options, **variant}
    expected = dense_statistics(*arguments, **shared)
    actual = attention_statistics(*arguments, **shared, backend=backend)
    for name, error in relative_errors(actual, expected):
        assert error <= tolerance, name
    if not options.sink_tokens:
        banded = attention_statistics(*arguments, **shared, backend=backend, lse=expected.lse.float())
        for name, error in relative_errors(banded, expected, BANDED):
            assert error <= max(tolerance, 5e-6), name  # lse itself is rounded to fp32


def long_batch(packed):
    batch = packed([1025, 300, 2048], heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16)
    return batch.q.cuda(), batch.k.cuda(), batch.cu_seqlens, batch.response_starts


@pytest.mark.parametrize("banded", [False, True])
def test_same_bits_every_time(packed, banded):
    arguments = long_batch(packed)
    shared = {"scale": 0.125, "options": StatisticsOptions()}
    first = attention_statistics(*arguments, **shared)
    lse = first.lse if banded else None
    first = attention_statistics(*arguments, **shared, lse=lse)
    for _ in range(5):
        again = attention_statistics(*arguments, **shared, lse=lse)
        for name in BANDED if banded else [field.name for field in fields(first)]:
            assert torch.equal(getattr(again, name), getattr(first, name)), name


@pytest.mark.parametrize("banded", [False, True])
def test_cuda_graph_and_compile(packed, banded):
    """A captured graph replays on new values; torch.compile traces the operators without a break."""
    q, k, cu_seqlens, starts = long_batch(packed)
    from rlattn.kernels.fused import fused_statistics  # needs triton

    options, variant = StatisticsOptions(), AttentionVariant(0.125)
    bounds = bounds_of(cu_seqlens, starts, q.device, options)
    lse = attention_statistics(q, k, cu_seqlens, starts, scale=0.125, options=options).lse if banded else None

    def run(q, k, lse):
        return fused_statistics(q, k, bounds, options, variant, lse)

    run(q, k, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, lse)
    q.copy_(q.roll(1, 1))
    graph.replay()
    compiled = torch.compile(run, fullgraph=True)(q, k, lse)
    expected = run(q, k, lse)
    for name, values in expected.items():
        if values is not None:
            assert torch.equal(captured[name], values), name
            assert torch.equal(compiled[name], values), name


def test_no_host_sync(packed):
    arguments = long_batch(packed)
    shared = {"scale": 0.125, "options": StatisticsOptions()}
    attention_statistics(*arguments, **shared)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_statistics(*arguments, **shared)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_banded_capture_equals_full_capture(tiny_model, token_batch):
    """Flash attention's own log-sum-exp in place of a pass over the keys."""
    model = tiny_model(head_dim=32).to("cuda", torch.bfloat16)
    batch = {
        name: value.cuda() if name.endswith("ids") else value for name, value in token_batch([33, 1, 150, 300]).items()
    }
    found = []
    for spans in (True, False):
        capture = Capture([1, 2], StatisticsOptions(), [10, 33, 50, 200], spans=spans)
        with torch.no_grad():
            model.base_model(**batch, capture=capture)
        found.append(capture.statistics)
    for layer in (1, 2):
        full, banded = found[0][layer], found[1][layer]
        assert banded.span is None
        for name, error in relative_errors(banded, full, ["waad", "fai", "sink_mass"]):
            assert error <= 1e-5, name
        response = full.lse != 0  # flash attention knows the prompt's rows too
        assert torch.allclose(banded.lse[response], full.lse[response], rtol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 20}, {"softcap": 2.0, "sinks": torch.randn(8)}])
@pytest.mark.parametrize("heads", [8, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding(packed, dtype, heads, variant):
    batch = packed([150, 333, 1, 40], heads=8, kv_heads=heads, dim=128, dtype=dtype)
    assert_decoded(batch, StatisticsOptions(), given_lse=True, device="cuda", **variant)
