"""Fused norms: which are, that they compute the same, and that nothing else changes."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from rlattn.trainers.norms import fuse_norms
from tests.make import tiny_qwen3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_stay_what_they_were(dtype):
    plain, fused = (tiny_qwen3(initializer_range=0.1).to(dtype) for _ in range(2))
    for model in (plain, fused):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
    layers = len(plain.model.layers)
    assert fuse_norms(fused) == 4 * layers + 1  # two on hidden states, queries' and keys' in each layer, and the last
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    logits = [model(tokens).logits for model in (plain, fused)]
    for each in logits:
        each.float().square().mean().backward()
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=tolerance)
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * a.grad.norm(), name
    assert plain.state_dict().keys() == fused.state_dict().keys()


def test_norms_that_compute_something_else_are_left_alone():
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    torch.manual_seed(0)
    gemma = GemmaForCausalLM(GemmaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    for name, parameter in gemma.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    tokens = torch.randint(0, 50, (1, 9))
    before = gemma(tokens).logits
    assert fuse_norms(gemma) == 0
    assert fuse_norms(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))) == 0
    assert torch.equal(gemma(tokens).logits, before)
