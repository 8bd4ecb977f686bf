"""Capture in padded forwards: the statistics of a packed one, and not a bit of the forward changed."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlattn.kernels import Capture, PaddedCapture, Padding, StatisticsOptions, listen

OPTIONS = StatisticsOptions(waad_window=4, fai_low=3, fai_high=11)
ROWS = [(3, 9), (1, 14), (6, 0), (4, 1)]  # prompt and response tokens; the third has no response
ATTENTION = torch.zeros(4, 20, dtype=torch.int64)
RESPONSE = torch.zeros(4, 20, dtype=torch.bool)
for row, (prompt, response) in enumerate(ROWS):
    ATTENTION[row, 6 - prompt : 6 + response] = 1
    RESPONSE[row, 6 : 6 + response] = True


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Transformers' own entry to begin with, and again at the end."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(61, ATTENTION.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_statistics_are_those_of_a_packed_forward(tiny_model, ids, kind):
    padding = Padding.of(ATTENTION, RESPONSE)
    listen("sdpa")
    padded, packed = (Capture([1, 3], OPTIONS, padding.response_starts) for _ in range(2))
    lengths = [a + b for a, b in ROWS]
    with torch.no_grad():
        tiny_model(kind, "sdpa")(input_ids=ids, attention_mask=ATTENTION, capture=PaddedCapture(padded, padding))
        tiny_model(kind)(
            input_ids=padding.pack(ids)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            use_cache=False,
            cu_seqlens=padding.cu_seqlens,
            capture=packed,
        )
    assert sorted(padded.statistics) == [1, 3]
    for layer, statistics in padded.statistics.items():
        for name, values in vars(statistics).items():
            expected = getattr(packed.statistics[layer], name)
            # Padding shifts positions; rotary attention knows only differences, up to rounding
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_forward_and_gradients_stay_the_same_to_the_bit(tiny_model, ids):
    def learn(**keywords):
        model = tiny_model("qwen3", "sdpa")
        loss = model(input_ids=ids, attention_mask=ATTENTION, labels=ids, **keywords).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = learn()
    listen("sdpa")
    listen("sdpa")
    padding = Padding.of(ATTENTION, RESPONSE)
    capture = Capture([0], OPTIONS, padding.response_starts)
    for keywords in ({}, {"capture": PaddedCapture(capture, padding)}):
        assert all(torch.equal(a, b) for a, b in zip(learn(**keywords), expected, strict=True))
    assert list(capture.statistics) == [0]


def test_packing_and_back():
    padding = Padding.of(ATTENTION, RESPONSE)
    assert padding.cu_seqlens.tolist() == [0, 12, 27, 33, 38]
    assert padding.response_starts.tolist() == [3, 13, 33, 37]
    values = torch.arange(80.0).view(4, 20)
    restored = padding.unpack(padding.pack(values), fill=-1.0)
    assert torch.equal(restored, torch.where(ATTENTION.bool(), values, -1.0))


@pytest.mark.parametrize(
    ("attention", "response"),
    [
        ([1, 0, 1, 1], [0, 0, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, 1, 0]),
        ([1, 1, 1, 0], [0, 0, 1, 1]),
    ],
    ids=["a hole", "no token", "something after the response", "a response in the padding"],
)
def test_other_layouts_are_refused(attention, response):
    good = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"row 1 .*prompt, then response"):
        Padding.of(torch.cat([good, torch.tensor([attention])]), torch.cat([good, torch.tensor([response])]))


def test_a_cache_is_refused(tiny_model, ids):
    listen("sdpa")
    model, padding = tiny_model("qwen3", "sdpa"), Padding.of(ATTENTION[:1], RESPONSE[:1])
    capture = PaddedCapture(Capture([0], OPTIONS, padding.response_starts), padding)
    with torch.no_grad():
        cache = model(input_ids=ids[:1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="20 queries and 40 keys"):
            model(input_ids=ids[:1], past_key_values=cache, capture=capture)


@pytest.mark.parametrize("name", ["eager", "rlattn", "nothing"])
def test_only_registered_implementations_can_be_listened_to(name):
    with pytest.raises(ValueError, match=rf"attn_implementation='{name}' cannot be listened to; accepted: .*sdpa"):
        listen(name)
