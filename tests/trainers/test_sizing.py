"""Clusters on paper: known parameter counts, and bytes per GPU by hand."""

import pytest
from transformers import LlamaConfig, Qwen3Config

from rlattn.cli import main
from rlattn.config import RunConfig
from rlattn.rollout.fit import NoRoom, alike
from rlattn.rollout.placement import plan
from rlattn.trainers.memory import GIB, estimate
from rlattn.trainers.sizing import check_memory, study

QWEN = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
SHAPES = {
    "4B": (
        Qwen3Config(
            **QWEN,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            tie_word_embeddings=True,
        ),
        4_022_468_096,
    ),
    "8B": (
        Qwen3Config(
            **QWEN,
            hidden_size=4096,
            intermediate_size=12_288,
            num_hidden_layers=36,
            num_attention_heads=32,
            tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
    "32B": (
        Qwen3Config(
            **QWEN,
            hidden_size=5120,
            intermediate_size=25_600,
            num_hidden_layers=64,
            num_attention_heads=64,
            tie_word_embeddings=False,
        ),
        32_762_123_264,
    ),
    "70B": (
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128_256,
            tie_word_embeddings=False,
        ),
        70_553_706_496,
    ),
}
"""Published shapes, with the parameters that they are published with."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, (shape, _) in SHAPES.items():
        made[name] = tmp_path_factory.mktemp(name)
        shape.save_pretrained(made[name])
    return made


def run_config(folder, ranks, engines, width, zero=3, **policy):
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "rollout": {
                "num_engines": engines,
                "tensor_parallel_size": width,
                "max_prompt_length": 1024,
                "max_completion_length": 3072,
                "num_generations": 8,
            },
            "policy": {
                "ranks": ranks,
                "tokens_per_micro_batch": 16_384,
                "gradient_checkpointing": True,
                "deepspeed": {"zero_optimization": {"stage": zero}},
            }
            | policy,
            "trainer": {"prompts_per_step": 64},
        }
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_published_ones(folders, name):
    assert estimate(run_config(folders[name], 8, 1, 1)).parameters == SHAPES[name][1]


@pytest.mark.parametrize(
    ("name", "nodes", "ranks", "engines", "width"),
    [
        ("4B", 1, 4, 4, 1),
        ("8B", 1, 6, 2, 1),
        ("4B", 8, 32, 32, 1),
        ("8B", 8, 32, 32, 1),
        ("32B", 8, 48, 8, 2),
        ("70B", 8, 48, 2, 8),
        ("32B", 64, 384, 64, 2),
        ("70B", 64, 384, 16, 8),
    ],
)
def test_8_64_and_512_gpus_hold_what_arithmetic_says(folders, name, nodes, ranks, engines, width):
    shape, parameters = SHAPES[name]
    config = run_config(folders[name], ranks, engines, width)
    needs = estimate(config)
    # ZeRO-3: bf16 weights, fp32 gradients, fp32 master weights and two moments, all sharded
    assert sum(needs.policy[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(
        parameters * (2 + 4 + 12) / ranks
    )
    assert needs.policy["gathered"] == 2 * min(parameters, 10**9)
    assert needs.policy["activations"] == 16_384 * shape.hidden_size * shape.num_hidden_layers * 2 * 2
    assert needs.policy["logits"] == 3 * 4 * 1024 * shape.vocab_size
    assert needs.engine["weights"] == 2 * parameters / width
    heads = 2 * shape.num_hidden_layers * 8 * 128 * 2  # keys and values of a token, bf16
    assert needs.engine["KV cache"] == pytest.approx(heads * 4096 * (64 * 8 / engines) / width)
    lines = study(config, alike(nodes, GPU=8, CPU=64), 80)
    assert sum(line.startswith("node ") for line in lines) == nodes
    assert f"policy rank: {sum(needs.policy.values()) / GIB:.1f} of 80 GiB a GPU" in lines


def test_zero_stages_shard_one_after_the_other(folders):
    p, ranks = SHAPES["4B"][1], 4
    for stage, by_hand in {
        0: 16 * p,  # whose gradients are bf16, see RunConfig
        1: 6 * p + 12 * p / ranks,
        2: 2 * p + 16 * p / ranks,
        3: 18 * p / ranks,
    }.items():
        block = {"zero_optimization": {"stage": stage}}
        block |= {} if stage else {"data_types": {"grad_accum_dtype": "bf16"}}
        needs = estimate(run_config(folders["4B"], ranks, 1, 1, deepspeed=block))
        assert sum(needs.policy[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(by_hand)


def test_offload_moves_bytes_to_the_node(folders):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    p = SHAPES["8B"][1]
    needs = estimate(run_config(folders["8B"], 2, 1, 1, deepspeed={"zero_optimization": zero}))
    assert sum(needs.host.values()) == pytest.approx(18 * p / 2)
    assert not {"weights", "gradients", "optimizer"} & needs.policy.keys()


@pytest.mark.parametrize(
    ("case", "gib"),
    [
        (("0.6B", {"data_types": {}}), 14.18),
        (("4B", {"data_types": {"grad_accum_dtype": "bf16"}}), 67.52),
    ],
)
def test_the_estimate_is_near_what_an_h100_measured(tmp_path, case, gib):
    """benchmarks/results/policy_vs_trl.json, update of 16 x 1,024 tokens, ZeRO-1 on one rank."""
    name, block = case
    shape = SHAPES["4B"][0]
    if name == "0.6B":
        shape = Qwen3Config(
            **QWEN,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            tie_word_embeddings=True,
        )
    shape.save_pretrained(tmp_path)
    block = {"zero_optimization": {"stage": 1}} | block
    needs = estimate(run_config(tmp_path, 1, 1, 1, deepspeed=block))
    assert sum(needs.policy.values()) / GIB == pytest.approx(gib, rel=0.06)


@pytest.mark.parametrize(
    ("name", "nodes", "ranks", "engines", "width", "message"),
    [
        ("32B", 1, 6, 1, 2, r"^policy rank: \d+\.\d of 80 GiB: \d+\.\d GiB short; what helps: more policy\.ranks, off"),
        ("70B", 8, 56, 8, 1, r"^engine: 13\d\.\d of 80 GiB: .*; what helps: a larger rollout\.tensor_parallel_size"),
        ("4B", 1, 6, 4, 1, r"^2 GPUs short: policy rank 0-5, engine 0-3 ask for 10, and the 1 nodes have 8$"),
    ],
)
def test_what_cannot_be_says_what_helps(folders, name, nodes, ranks, engines, width, message):
    with pytest.raises(NoRoom, match=message):
        study(run_config(folders[name], ranks, engines, width), alike(nodes, GPU=8, CPU=64), 80)


def test_a_shared_gpu_must_hold_both(folders, capsys):
    share = ["ray.placement=colocate", "policy.gpus_per_rank=0.5", "rollout.num_engines=4"]
    command = ["plan", "countdown_grpo", f"model.path={folders['4B']}", *share, "--nodes", "1"]
    assert main(command) == 2
    assert "policy rank + engine: 9" in capsys.readouterr().err
    assert main([*command, "rollout.gpu_memory_utilization=0.4"]) == 0
    assert "policy rank 0-3, engine 0-3" in capsys.readouterr().out


def test_an_engine_that_sleeps_needs_its_memory_only_beside_what_the_policy_keeps(folders):
    """1 rank: 4B parameters keep 2 + 4 + 12 bytes each; an engine with a tenth of the GPU comes on top of that."""
    parameters = SHAPES["4B"][1]
    tree = run_config(folders["4B"], 1, 1, 1, zero=1, gpus_per_rank=0.5).model_dump(exclude_unset=True)
    tree["ray"] = {"placement": "colocate"}
    tree["rollout"] |= {"gpu_memory_utilization": 0.1}
    awake = RunConfig.model_validate(tree)
    asleep = RunConfig.model_validate(tree | {"rollout": tree["rollout"] | {"sleep": True}})
    peak = sum(estimate(awake).policy.values())
    kept = 18 * parameters
    assert estimate(awake).kept == pytest.approx(kept)
    engine = 0.1 * 140 * GIB
    for config, shared, taken in ((awake, "", peak + engine), (asleep, " by turns", max(peak, kept + engine))):
        (line,) = check_memory(config, plan(config), estimate(config), 140)
        assert line == f"policy rank + engine{shared}: {taken / GIB:.1f} of 140 GiB a GPU"
    with pytest.raises(NoRoom, match=r"what helps: .*rollout\.sleep=true"):
        check_memory(awake, plan(awake), estimate(awake), 80)
