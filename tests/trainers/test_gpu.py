"""The loop, evaluation and the TRL adapter on one GPU, each by the command or class that users have; small models."""

import subprocess
import sys

import pytest
import torch

from rlattn.tracking import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

RLATTN = [sys.executable, "-P", "-m", "rlattn.cli"]
SMALL = [
    "task.options.train_size=2000",
    "task.options.test_size=32",
    "task.options.format_reward=0.5",
    "model.warmup.hidden_size=128",
    "model.warmup.intermediate_size=256",
    "model.warmup.num_layers=4",
    "model.warmup.num_heads=4",
    "model.warmup.num_kv_heads=2",
    "model.warmup.head_dim=32",
    "model.warmup.steps=200",
    "rollout.max_completion_length=128",
    "rollout.gpu_memory_utilization=0.15",
    "trainer.prompts_per_step=8",
    "trainer.steps=3",
    "trainer.eval_steps=3",
    "trainer.save_steps=3",
]
EAGER = "rollout.enforce_eager=true"  # starts in half the time; the first variant has CUDA graphs
VARIANTS = {
    "asleep, weights read in place": [],
    "signals from the engine": [EAGER, "signals.source=rollout", "algorithm.vllm_importance_sampling_correction=false"],
    "signals while sampling": [
        "signals={source: rollout, forward: decode, heads: {scope: calibrated}}",
        "algorithm.vllm_importance_sampling_correction=false",
    ],
    "adapters as adapters": [EAGER, "policy.lora={sync: adapter, r: 8}"],
    "flow credit": [EAGER, "credit.name=flow"],
    "one forward": [EAGER, "signals={forward: train, heads: {scope: sequence}}", "algorithm.steps_per_generation=1"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"model.warmup.cache_dir={tmp_path_factory.mktemp('warmup')}"


def finish(*args):
    done = subprocess.run([*RLATTN, *args], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_loop(tmp_path, cache, variant):
    """Three steps; the engine's log-probs are the policy's after each, so the weights went over."""
    folder = tmp_path / "run"
    finish("train", "countdown_one_gpu", f"output_dir={folder}", cache, *SMALL, *VARIANTS[variant])
    steps = [line for line in read_metrics(folder) if line["step"]]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["rollout/engines_lost"] == 0 for line in steps)
    if "signals" not in variant:
        assert all(line["sampling/sampling_logp_difference/mean"] < 0.03 for line in steps)
    if not VARIANTS[variant]:
        finish("eval", str(folder), "--limit", "16", "--out", str(tmp_path / "eval"))


def test_trls_trainer_with_credit(tmp_path):
    from tests.trainers.test_trl import credited, make

    options = {"use_cpu": False, "bf16": True, "learning_rate": 1e-4}
    trainer = make(credited(), tmp_path, options=options, credit={"name": "coupled_rhythm"})
    trainer.train()
    logged = [line for line in trainer.state.log_history if "credit/mean_gamma" in line]
    assert len(logged) == 2
    assert all(line["credit/mean_gamma"] > 1 for line in logged)
