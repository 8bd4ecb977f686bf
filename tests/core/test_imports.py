"""Heavy packages are imported only by the rooms that use them."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "vllm", "deepspeed", "trl", "transformers"]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys, json\n{statement}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_rlattn_loads_nothing_heavy():
    assert loaded_after("import rlattn, rlattn.config, rlattn.cli") == set()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rlattn.kernels", {"ray", "vllm", "deepspeed", "trl"}),
        (
            "import rlattn.credit, rlattn.losses, rlattn.signals, rlattn.tasks.countdown",
            {"ray", "vllm", "deepspeed", "trl"},
        ),
        ("import rlattn.report, rlattn.tracking", {"ray", "vllm", "deepspeed", "trl"}),
        ("import rlattn.evaluation.command, rlattn.evaluation.score, rlattn.tasks.math", set(HEAVY)),
        ("import rlattn.analysis.command", set(HEAVY)),
        ("import rlattn.analysis.analyze, rlattn.analysis.results", {"ray", "vllm", "deepspeed", "trl"}),
        ("import rlattn.rollout.evaluate", {"vllm", "deepspeed", "trl"}),
        ("import rlattn.rollout.pool", {"vllm", "deepspeed", "trl"}),  # vllm is loaded inside the engine actors
        ("import rlattn.rollout.placement", {"ray", "vllm", "deepspeed", "trl"}),
        ("import rlattn.trainers.grpo", {"vllm", "deepspeed", "trl"}),
        ("import rlattn.trainers.warmup", {"vllm", "ray", "deepspeed", "trl"}),  # trl only when a model is made
    ],
)
def test_rooms_load_only_what_they_use(statement, absent):
    assert not loaded_after(statement) & absent


def test_import_is_fast():
    """`import rlattn` stays under a second; a bound on work done (modules loaded), not on this machine's clock."""
    code = "import sys; before = set(sys.modules); import rlattn, rlattn.cli; print(len(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(out.stdout) < 400
