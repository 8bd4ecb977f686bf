"""Adapters: what learns, what engines are given, what is saved, whatever shards them."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlattn.config import ConfigError, LoRAConfig
from rlattn.estimators.grpo import group_relative
from rlattn.trainers.lora import adapted, entries
from rlattn.trainers.memory import estimate
from tests.make import fetch_weights, make_rollouts, policy_config, policy_of, tiny_qwen3


def config(ranks=1, stage=0, **policy):
    learned = {"learning_rate": 1e-2, "lora": {"r": 4, "lora_alpha": 8}}
    return policy_config(ranks, stage, policy=learned | policy, algorithm={"beta": 0.1})


def test_merged_weights_are_base_plus_scaled_product():
    model = tiny_qwen3()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), seed=0)
    merged = {name: make() for name, _, make in entries(model)}
    names = {name for name, _ in tiny_qwen3().named_parameters()}
    assert merged.keys() == names
    assert all(torch.equal(merged[name], before[name]) for name in names)  # B starts at zero
    layer = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    moved = {name for name, _, make in entries(model) if not torch.equal(make(), before[name])}
    assert moved == {"model.layers.1.self_attn.q_proj.weight"}
    whole = {name: make() for name, _, make in entries(model)}["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(whole, before["model.layers.1.self_attn.q_proj.weight"] + 2 * b @ a)


def test_unknown_layers_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"policy\.lora\.target_modules. = \['nowhere'\]"):
        adapted(tiny_qwen3(), LoRAConfig(target_modules=["nowhere"]), seed=0)


def test_memory_counts_only_what_learns():
    full, small = estimate(config(lora=None)), estimate(config())
    assert small.policy["optimizer"] < full.policy["optimizer"] / 5
    assert small.policy["weights"] > full.policy["weights"] * 0.9
    assert small.policy["reference"] == 0 < full.policy["reference"]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    rollouts = make_rollouts([5] * 12, torch.randint(1, 24, (12,), generator=generator).tolist(), group_size=4)
    rollouts = rollouts.replace(rewards=torch.rand(12, generator=generator))
    advantage, _ = group_relative(rollouts.rewards, rollouts.group_ids, "group")
    return rollouts, advantage[rollouts.sequence_ids]


def plain_logps(model, rollouts):
    """[n] of every response token, each sequence run alone."""
    parts = []
    with torch.no_grad():
        for b in range(len(rollouts)):
            tokens = rollouts.token_ids[rollouts.cu_seqlens[b] : rollouts.cu_seqlens[b + 1]]
            table = model(tokens[None]).logits[0].log_softmax(-1)
            prompt = int(rollouts.prompt_lengths[b])
            parts.append(table[prompt - 1 : -1].gather(1, tokens[prompt:, None])[:, 0])
    return torch.cat(parts)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "checkpointing"), [(1, 0, False), (2, 3, True)])
def test_adapters_learn_and_are_saved(local_ray, model_path, batch, tmp_path, ranks, stage, checkpointing):
    rollouts, advantages = batch
    settings, mask = config(ranks, stage, gradient_checkpointing=checkpointing), rollouts.response_mask
    with policy_of(settings, model_path) as policy:
        before = policy.score(rollouts)
        policy.update(rollouts, before, advantages, step=0)
        after, weights = policy.score(rollouts), fetch_weights(policy.weights())
        policy.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    close(before.logps[mask], plain_logps(base, rollouts))
    close(after.reference_logps, before.logps)  # the starting weights, without a second model
    assert (after.logps - before.logps)[mask].abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    assert weights.keys() == dict(merged.named_parameters()).keys()
    merged.load_state_dict(weights, strict=False)
    moved = {name for name, p in base.named_parameters() if not torch.equal(p, weights[name])}
    assert moved
    assert not any("embed" in name or "norm" in name for name in moved)
    close(plain_logps(merged, rollouts), after.logps[mask])  # what the engine is given is what the policy is
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    close(plain_logps(saved, rollouts), after.logps[mask])
    close(plain_logps(PeftModel.from_pretrained(base, tmp_path / "adapter"), rollouts), after.logps[mask])

    with policy_of(settings, str(tmp_path / "model"), model_path, tmp_path) as policy:
        again = policy.score(rollouts)
    assert torch.equal(again.logps, after.logps)
    assert torch.equal(again.reference_logps, after.reference_logps)
