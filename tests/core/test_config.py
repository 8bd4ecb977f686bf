from pathlib import Path

import pytest
import yaml

from rlattn.config import ConfigError, RunConfig, Section, load_config

SHIPPED = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def sections(model=RunConfig):
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_parse_by_path_and_by_name(path):
    assert load_config(path) == load_config(path.stem)


def test_defaults_are_the_papers():
    config = RunConfig()
    assert (config.credit.amplification, config.credit.top_q, config.credit.sign) == (1.5, 0.4, "both")
    assert (config.credit.alpha, config.credit.window, config.credit.tau_waad) == (0.5, 3, 0.5)
    signals = config.signals
    assert (signals.layers, signals.heads.fraction) == (5, 0.3)
    assert (signals.waad_window, signals.fai_low, signals.fai_high, signals.sink_tokens) == (10, 10, 100, 0)
    assert (config.algorithm.beta, config.policy.learning_rate, config.rollout.temperature) == (0.0, 1e-6, 1.0)


def test_every_field_is_documented():
    for section in sections():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"


def test_overrides_are_yaml_values(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\n")
    config = load_config(path, ["credit.top_q=0.2", "policy.betas=[0.8, 0.95]", "signals.fai_high=null", "seed=4"])
    assert (config.credit.top_q, config.policy.betas, config.signals.fai_high, config.seed) == (
        0.2,
        (0.8, 0.95),
        None,
        4,
    )


@pytest.mark.parametrize("scope", ["calibrated", "sequence"])
def test_training_may_capture_where_a_batch_takes_one_step(tmp_path, scope):
    path = tmp_path / "c.yaml"
    path.write_text(f"signals: {{forward: train, heads: {{scope: {scope}, refresh_steps: 5}}}}\n")
    assert load_config(path).signals.forward == "train"


def test_training_may_capture_where_no_groups_are_needed():
    assert load_config("countdown_grpo", ["signals={forward: train, heads: {select: all}}", "algorithm={}"])


@pytest.mark.parametrize(("text", "layers"), [("7", 7), ("null", None), ("[0, 3]", [0, 3])])
def test_ways_to_name_layers(text, layers):
    assert load_config("quickstart", [f"signals.layers={text}"]).signals.layers == layers


def test_the_resolved_config_reads_back_the_same(tmp_path):
    config = load_config(SHIPPED[0])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["credit.topq=0.2"], "unknown key `credit.topq`; did you mean `credit.top_q`?"),
        (["top_q=0.2"], "unknown key `top_q`; did you mean `credit.top_q`?"),
        (["credits.top_q=0.2"], "unknown key `credits`; did you mean `credit`?"),
        (["credit.top_q=1.5"], "`credit.top_q` = 1.5: input should be less than or equal to 1"),
        (["credit.name=coupled"], "no credit strategy called 'coupled'; did you mean 'coupled_rhythm'?"),
        (["algorithm.loss_type=ppo"], "known: grpo, dr_grpo, dapo, bnpo"),
        (["task.name=countdwn"], "did you mean 'countdown'?"),
        (["policy.deepspeed={train_batch_size: 4}"], "'train_batch_size' is set by trainer.prompts_per_step"),
        (["policy.tokens_per_micro_batch=100"], "raise it to at least 1536"),
        (["algorithm.steps_per_generation=7"], "must divide the batch of 512 responses"),
        (["policy.ranks=600"], "policy.ranks=600"),
        (["signals.fai_high=3"], "fai_high=3 must be at least fai_low=10"),
        (["signals.heads.refresh_steps=0"], "`signals.heads.refresh_steps` = 0: input should be greater than or equal"),
        (["signals.forward=train"], "cannot have signals.heads.scope=batch"),
        (
            ["signals.forward=train", "signals.heads.scope=calibrated", "algorithm.steps_per_generation=2"],
            "not algorithm.num_iterations=1 times algorithm.steps_per_generation=2; set both to 1",
        ),
        (
            ["signals.forward=train", "signals.heads.scope=sequence", "algorithm.num_iterations=3"],
            "not algorithm.num_iterations=3 times algorithm.steps_per_generation=1; set both to 1",
        ),
        (
            ["signals.layers=0"],
            "`signals.layers` = 0: must be a number of layers, at least 1, null for all, or",
        ),
        (["signals.layers=true"], "`signals.layers` = True: must be a number of layers"),
        (["signals.layers=middle"], "`signals.layers` = 'middle': must be a number of layers"),
        (["signals.layers=[]"], "`signals.layers` = []: must be a number of layers"),
        (["signals.layers=[3, 3]"], "`signals.layers` = [3, 3]: must be a number of layers"),
        (["signals.layers=[-1, 3]"], "`signals.layers` = [-1, 3]: must be a number of layers"),
        (["signals.layers=[1, 2]", "signals.layer_range=top"], "layer_range=top has no effect; leave layer_range out"),
        (["signals.layer_range=upper"], "`signals.layer_range` = 'upper': input should be 'middle', 'bottom', 'top'"),
        (["signals.heads.select=recievers"], "input should be 'span', 'receiver' or 'all'"),
        (["credit.selection_q=0"], "`credit.selection_q` = 0: input should be greater than 0"),
        (["credit.reweight_alpha=1.5"], "`credit.reweight_alpha` = 1.5: input should be less than or equal to 1"),
        (["credit.position=middle"], "`credit.position` = 'middle': input should be 'even', 'start' or 'end'"),
        (["seed"], "is not of the form key=value"),
        (["seed=1", "seed.x=1"], "`seed` is a value, not a section"),
        (["credit.name=[1"], "override 'credit.name=[1'"),
    ],
)
def test_bad_input_is_one_line_that_names_what_would_do(tmp_path, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 0\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("- 1\n", "must hold a mapping"), ("\x00", "is not valid YAML")],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_lists_the_shipped_names():
    with pytest.raises(ConfigError, match=r"no config file at 'quickstrt'.*quickstart"):
        load_config("quickstrt")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"algorithm": {"beta": 0.1}}, r"algorithm\.beta=0\.1"),
        ({"algorithm": {"name": "ppo"}}, r"algorithm\.name=ppo"),
        ({"algorithm": {"vllm_importance_sampling_correction": True}}, "algorithm.vllm_importance_sampling_correction"),
        ({"rollout": {"top_p": 0.9}}, r"rollout\.top_p=0\.9"),
        ({"credit": {"name": "entropy"}}, r"credit\.name=entropy"),
        ({"signals": {"forward": "train"}}, r"signals\.forward=train"),
    ],
)
def test_signals_from_the_engines_leave_out_what_only_the_policy_gives(changes, named):
    RunConfig.model_validate({"signals": {"source": "rollout"}})
    tree = changes | {"signals": {"source": "rollout"} | changes.get("signals", {})}
    with pytest.raises(ValueError, match=f"signals.source=rollout runs no scoring forward, which {named} needs"):
        RunConfig.model_validate(tree)


def test_engines_sleep_where_they_share_a_gpu_and_have_nothing_to_do():
    with pytest.raises(ValueError, match=r"rollout\.sleep=true gives memory .* but ray\.placement=separate has none"):
        RunConfig.model_validate({"rollout": {"sleep": True}})
    ahead = {"rollout": {"sleep": True, "steps_ahead": 1}, "ray": {"placement": "colocate"}}
    with pytest.raises(ValueError, match="an engine cannot sample asleep"):
        RunConfig.model_validate(ahead | {"algorithm": {"vllm_importance_sampling_correction": True}})
    assert RunConfig.model_validate({"rollout": {"sleep": True}, "ray": {"placement": "colocate"}}).rollout.sleep


def test_bfloat16_without_zero_needs_gradients_of_its_own_type():
    def build(block, dtype="bfloat16"):
        return RunConfig.model_validate({"model": {"dtype": dtype}, "policy": {"deepspeed": block}})

    for refused in ({}, {"zero_optimization": {"stage": 0}}):
        with pytest.raises(ValueError, match=r"cannot add up gradients in fp32 for model\.dtype=bfloat16"):
            build(refused)
        build(refused, "float32")
        build(refused | {"data_types": {"grad_accum_dtype": "bf16"}})
    build({"zero_optimization": {"stage": 1}})


def test_a_step_ahead_needs_the_correction():
    with pytest.raises(ValueError, match=r"rollout\.steps_ahead=1 learns from completions of older weights"):
        RunConfig.model_validate({"rollout": {"steps_ahead": 1}})
    correction = {"vllm_importance_sampling_correction": True}
    assert RunConfig.model_validate({"rollout": {"steps_ahead": 1}, "algorithm": correction}).rollout.steps_ahead == 1
