"""The Triton kernels under Triton's interpreter, on the CPU: the definitions, at small odd sizes."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from rlattn.kernels import AttentionStatistics, StatisticsOptions, attention_statistics
from rlattn.kernels.reference import dense_statistics
from tests.kernels.decoding import assert_decoded

pytest.importorskip("triton")
from triton import knobs

if not knobs.runtime.interpret:  # Triton reads it when it is imported, so a process of its own is needed
    pytest.skip("test_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)
NAMES = [field.name for field in fields(AttentionStatistics)]
BANDED = ["lse", "waad", "fai", "sink_mass"]
LENGTHS = [5, 33, 1, 150, 77]  # two and more tiles, one token, boundaries inside tiles


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch fills new tensors with NaN, so that an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(actual, expected, names=NAMES):
    for name in names:
        a, e = getattr(actual, name), getattr(expected, name).double()
        assert a.dtype == torch.float32
        error = (a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


def check(batch, options, **variant):
    arguments = (batch.q, batch.k, batch.cu_seqlens, batch.response_starts)
    shared = {"options": options, "scale": 0.3} | variant
    expected = dense_statistics(*arguments, **shared)
    assert_near(attention_statistics(*arguments, **shared, backend="triton"), expected)
    if options.sink_tokens:
        return
    for backend in ("triton", "torch"):
        banded = attention_statistics(*arguments, **shared, lse=expected.lse.float(), backend=backend)
        assert banded.span is None
        assert banded.entropy is None
        assert_near(banded, expected, BANDED)


@pytest.mark.parametrize(
    "options",
    [
        StatisticsOptions(),
        StatisticsOptions(waad_window=1, fai_low=0, fai_high=0),
        StatisticsOptions(waad_window=70, fai_low=3, fai_high=None),
        StatisticsOptions(fai_low=60, fai_high=61, sink_tokens=1),
        StatisticsOptions(fai_low=0, fai_high=None, sink_tokens=40),
    ],
    ids=repr,
)
@pytest.mark.parametrize("window", [None, 9])
def test_options_and_windows(packed, options, window):
    check(packed(LENGTHS), options, sliding_window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 32), (4, 1, 64), (7, 1, 40), (8, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_shapes_and_types(packed, heads, kv_heads, dim, dtype):
    check(packed([40, 7, 90], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype), StatisticsOptions(fai_low=2))


def test_widest_head(packed):
    check(packed([70, 9], heads=2, kv_heads=1, dim=256), StatisticsOptions(fai_low=2, fai_high=30))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_softcap_and_learned_sinks(packed, window, sink_tokens):
    sinks = torch.tensor([-3.0, 0.0, 2.0, 5.0, 1.0, -20.0])
    options = StatisticsOptions(fai_low=2, sink_tokens=sink_tokens)
    check(packed([40, 90]), options, softcap=2.5, sinks=sinks, sliding_window=window)


def test_strided_inputs(packed):
    """Views into other layouts, such as the transposed ones that transformers hands over."""
    batch = packed([40, 61])
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.q, batch.k))
    every_second = torch.stack([k, k], -1).flatten(-2)[..., ::2]
    arguments = (batch.cu_seqlens, batch.response_starts)
    shared = {"options": StatisticsOptions(), "scale": 0.3}
    expected = attention_statistics(batch.q, batch.k, *arguments, **shared, backend="triton")
    actual = attention_statistics(q, every_second, *arguments, **shared, backend="triton")
    for name in NAMES:
        assert torch.equal(getattr(actual, name), getattr(expected, name))


def test_sequences_without_a_response(packed):
    batch = packed([30, 150, 20])
    arguments = (batch.q, batch.k, batch.cu_seqlens, [30, 180, 190])
    shared = {"options": StatisticsOptions(fai_low=1), "scale": 0.3}
    actual = attention_statistics(*arguments, **shared, backend="triton")
    assert_near(actual, dense_statistics(*arguments, **shared))
    for name in NAMES:
        assert (getattr(actual, name)[:, :190] == 0).all()


def test_great_distances_keep_their_last_digits(packed):
    """A head that attends two tokens back, far from the start: span 2, not a difference of two large sums."""
    n = 300
    angle = torch.arange(n) * 0.9
    k = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    q = torch.stack([(angle - 1.8).cos(), (angle - 1.8).sin()], -1)[:, None] * 40
    arguments = (q, k, [0, n], [250])
    shared = {"options": StatisticsOptions(), "scale": 1.0}
    assert_near(attention_statistics(*arguments, **shared, backend="triton"), dense_statistics(*arguments, **shared))


def test_operators_are_registered_properly(packed):
    """Schema, fake implementation and autograd key, as torch.compile relies on them."""
    from rlattn.kernels.band import band_statistics
    from rlattn.kernels.bounds import bounds_of
    from rlattn.kernels.full import full_statistics

    batch = packed([20, 9], heads=2, kv_heads=1)
    options = StatisticsOptions()
    bounds = bounds_of(batch.cu_seqlens, batch.response_starts, batch.q.device, options)
    logits = {"scale": 0.3, "sliding_window": None, "softcap": None}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for sink_tokens in (0, 2):
        arguments = (batch.q, batch.k, bounds.first_key, None)
        torch.library.opcheck(full_statistics, arguments, {"sink_tokens": sink_tokens, **logits}, test_utils=tests)
    for kept_lse in (None, torch.ones(2, 29)):
        per_token = (bounds.first_key, bounds.keys_counted, bounds.rows_counted)
        arguments = (batch.q, batch.k, torch.zeros(2, 29), kept_lse, *per_token, torch.zeros(2))
        settings = {"waad_window": 10, "fai_low": 3, **logits}
        torch.library.opcheck(band_statistics, arguments, settings, test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(10, 6, 300), "k": torch.zeros(10, 3, 300)}, "up to 256 channels a head, not 300"),
        ({"q": torch.zeros(10, 6, 32).double(), "k": torch.zeros(10, 3, 32).double()}, "float32, not torch.float64"),
        ({"k": torch.zeros(10, 3, 32).half()}, "must be of one type"),
        ({"lse": torch.zeros(6, 9)}, r"lse must be \[6, 10\]"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[6\]"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"scale": -1.0}, "scale=-1.0 must be above 0"),
        ({"lse": torch.zeros(6, 10), "options": StatisticsOptions(sink_tokens=2)}, "sink_tokens=2 needs the mass"),
        ({"backend": "cuda"}, "backend='cuda' must be auto, torch or triton"),
    ],
)
def test_what_they_cannot_do_is_refused(changes, message):
    arguments = {"q": torch.zeros(10, 6, 32), "k": torch.zeros(10, 3, 32), "cu_seqlens": [0, 4, 10]}
    arguments |= {"response_starts": [2, 6], "scale": 1.0, "options": StatisticsOptions(), "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        attention_statistics(**(arguments | changes))


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 20}, {"softcap": 2.0, "sinks": torch.tensor([0.5, -2.0])}])
@pytest.mark.parametrize("options", [StatisticsOptions(), StatisticsOptions(30, 0, 5), StatisticsOptions(3, 4, 140)])
def test_decoding(packed, options, variant):
    assert_decoded(packed([40, 33, 1], heads=2, kv_heads=1, dim=24), options, given_lse=True, **variant)


@pytest.mark.parametrize("heads", [3, 1])
def test_decoding_with_shared_key_heads_and_in_bfloat16(packed, heads):
    batch = packed([21, 9], heads=3, kv_heads=heads, dim=16, dtype=torch.bfloat16)
    assert_decoded(batch, StatisticsOptions(), given_lse=True)
