"""The run's configuration: one pydantic tree, read from YAML plus `key=value` overrides.

Every field has a default, a bound and a docstring; unknown keys are refused with the nearest known name. Defaults are
METHOD's ([Li 2026], arXiv 2510.13554v2) where it gives one, else TRL's. Nothing here is rewritten after validation:
what `--dry-run` prints is what runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlattn import registry

Schema = TypeVar("Schema", bound=BaseModel)
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]

# DeepSpeed keys that other parts of this tree own; setting them twice would mean that one of the two is ignored.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "trainer.prompts_per_step and rollout.num_generations",
    "train_micro_batch_size_per_gpu": "policy.tokens_per_micro_batch",
    "gradient_accumulation_steps": "policy.tokens_per_micro_batch",
    "gradient_clipping": "policy.max_grad_norm",
    "optimizer": "policy.learning_rate, policy.betas and policy.weight_decay",
    "scheduler": "policy.lr_schedule and policy.lr_warmup_steps",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}

FREE = ("output_dir", "ray.", "trainer.save_", "trainer.report_to", "trainer.log_completions")
"""Beginnings of keys that shape nothing of a run's result."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, its value and what would be accepted."""


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, docstrings are the fields' documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class TaskConfig(Section):
    """What is learned: problems, prompt and verifier."""

    name: str = "countdown"
    """A built-in task (a file in `rlattn/tasks`) or one installed under the entry point group `rlattn.tasks`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of generated problems; apart from the run's seed, so that runs of several seeds face the same test."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options, checked by the task (see its `Options`)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.TASKS.check(name)


class WarmupConfig(Section):
    """The model that `rlattn warmup` makes: a small Qwen3-shaped policy with a first skill learned by SFT."""

    hidden_size: Positive = 192
    """Width of the residual stream."""
    intermediate_size: Positive = 512
    """Width of the MLP."""
    num_layers: Positive = 4
    """Decoder layers."""
    num_heads: Positive = 4
    """Query heads."""
    num_kv_heads: Positive = 2
    """Key/value heads; must divide `num_heads`."""
    head_dim: Annotated[int, Field(ge=32, multiple_of=16)] = 32
    """Channels per head."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initialisation and worked solutions; apart from the run's seed, so that runs of several seeds start alike."""
    steps: Positive = 1300
    """SFT optimizer steps."""
    batch_size: Positive = 8
    """Worked solutions per SFT step."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-3
    """Peak SFT learning rate."""
    cache_dir: Path = Path("runs/warmup")
    """Finished models are kept here, in a folder named by the hash of everything that shapes them."""

    @model_validator(mode="after")
    def _groups(self) -> WarmupConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        return self


class ModelConfig(Section):
    """The policy's starting point."""

    path: str | None = None
    """A Hugging Face causal LM (folder or hub id). None means: the model that `warmup` makes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter type of policy and engine; bfloat16 keeps fp32 master weights in the optimizer."""
    warmup: WarmupConfig = WarmupConfig()
    """Shape and training of the small model; used only where `path` is None."""


class RolloutConfig(Section):
    """Generation by vLLM engines, each a Ray actor."""

    num_engines: Positive = 1
    """Engines; requests are split among them."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions sampled for a prompt: the GRPO group."""
    max_prompt_length: Positive = 512
    """Tokens; a longer prompt is an error, never cut."""
    max_completion_length: Positive = 1024
    """Tokens; a completion that reaches it is marked truncated."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature; log-probs are evaluated at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the trainer's log-probs (full distribution) differ from the sampler's, which is logged."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """KV cache per engine in GiB; None lets vLLM take `gpu_memory_utilization` of its GPU, or 1 GiB on CPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU that vLLM may take; used only on GPUs and without `kv_cache_gib`."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts sooner, generates slower."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to `vllm.LLM` as they are; keys that rlattn sets are refused."""
    start_timeout_s: Seconds = 600
    """Longest wait for an engine to load."""
    generate_timeout_s: Seconds = 1800
    """Longest wait for one step's completions."""
    weights_timeout_s: Seconds = 300
    """Longest wait for one weight transfer."""


class HeadsConfig(Section):
    """Which captured heads count as local-focused and which as global-focused [Li 2026, eq. 7-8]."""

    select: Literal["span", "receiver", "all"] = "span"
    """`span`: the lowest spans are local, the highest global. `receiver`: the global heads are those whose FAI is most
    peaked, by kurtosis over a response's positions (receiver heads, arXiv 2506.19143), among those not local. `all`: no
    groups, WAAD and FAI are means over every captured head (the paper's ablation)."""
    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.3
    """Share of the captured heads in each group."""
    scope: Literal["batch", "sequence", "calibrated"] = "batch"
    """Spans (and kurtosis) pooled over every response row of the step's batch, or over each sequence's own;
    `calibrated` pools them as `batch` does, but only every `refresh_steps` steps, and the steps between go without the
    pass that spans need."""
    refresh_steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    """calibrated: groups are measured at step 0 and every so many steps, and reused in between."""


class FlowConfig(Section):
    """The flow from prompt to answer over the mean attention map (credit `flow`); see docs/flow.md."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Edges of the mean map that weigh this or less are cut; 0 cuts none."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the map while it is gathered: 2 or 4 bytes for each pair of tokens of a sequence, halved."""
    fallback_tokens: Annotated[int, Field(ge=0)] = 10
    """A response in which the task finds no answer: so many of its last tokens count as one. With 0 it gets no credit
    beyond others."""


class SignalsConfig(Section):
    """Attention statistics: captured in a forward of the policy."""

    forward: Literal["score", "train"] = "score"
    """The forward that is captured. `score`: one before the update, which also gives the old log-probs. `train`: the
    update's own, before each micro-batch's loss, so that no scoring forward runs; for batches that take a single
    optimizer step, with `heads.scope` calibrated (steps that measure the groups score first) or sequence, or with
    `heads.select` all."""
    layers: int | list[int] | None = 5
    """How many evenly spaced layers of `layer_range`, fewer where the model has fewer there; null takes every one. Or a
    list, such as [3, 7, 11]: these layers, counted from 0."""
    layer_range: Literal["middle", "bottom", "top", "all"] = "middle"
    """The middle third [Li 2026, section 3], the layers below it, those above it, or all. Of hybrid models only
    full-attention layers count."""
    heads: HeadsConfig = HeadsConfig()
    """Head groups."""
    flow: FlowConfig = FlowConfig()
    """Measured only where the credit strategy asks for it."""
    waad_window: Positive = 10
    """W of eq. 9, tokens."""
    fai_low: Annotated[int, Field(ge=0)] = 10
    """H_lo of eq. 10, tokens."""
    fai_high: Positive | None = 100
    """H_hi of eq. 10, tokens; None reaches to the end of the response."""
    sink_tokens: Annotated[int, Field(ge=0)] = 0
    """First keys of a sequence left out of span and FAI, rows renormalised; 0 is the paper."""

    @field_validator("layers", mode="before")
    @classmethod
    def _which_layers(cls, layers: object) -> object:
        numbers = layers if isinstance(layers, list) else [1 if layers is None else layers]
        least = 0 if isinstance(layers, list) else 1
        whole = bool(numbers) and all(type(number) is int and number >= least for number in numbers)
        if not whole or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError("must be a number of layers, at least 1, null for all, or a rising list like [3, 7, 11]")
        return layers

    @model_validator(mode="after")
    def _explicit(self) -> SignalsConfig:
        if isinstance(self.layers, list) and self.layer_range != "middle":
            raise ValueError(
                f"layers={self.layers} names the layers, so layer_range={self.layer_range} has no effect; "
                "leave layer_range out, or give a number of layers"
            )
        return self

    @model_validator(mode="after")
    def _band(self) -> SignalsConfig:
        if self.fai_high is not None and self.fai_high < self.fai_low:
            raise ValueError(f"fai_high={self.fai_high} must be at least fai_low={self.fai_low}, or null")
        return self


class CreditConfig(Section):
    """How signals become gamma, the factor on each token's advantage [Li 2026, eq. 14-19]."""

    name: str = "coupled_rhythm"
    """A built-in strategy (a file in `rlattn/credit`) or one installed under the entry point group `rlattn.credit`."""
    amplification: Annotated[float, Field(gt=0)] = 1.5
    """g: gamma of a selected token."""
    top_q: Annotated[float, Field(gt=0, le=1)] = 0.4
    """q: share of a response's tokens that are selected."""
    which: Literal["top", "bottom"] = "top"
    """Select the largest values, or the smallest (the paper's collapse ablation)."""
    sign: Literal["both", "positive", "negative"] = "both"
    """Shape every advantage, or only those of one sign (v1 of the paper: positive)."""
    alpha: Share = 0.5
    """coupled_rhythm: share of a dominated anchor's bonus that moves to its introducing token."""
    window: Annotated[int, Field(ge=1)] = 3
    """coupled_rhythm: k, how many tokens before an anchor may introduce it (paper: 1 to 3)."""
    tau_waad: Share = 0.5
    """coupled_rhythm: quantile of the response's WAAD at or below which an anchor counts as locally attending."""
    tau_delta: Share | None = None
    """coupled_rhythm: quantile of the response's WAAD change at or above which it counts as a jump; None takes the
    smallest change inside TopQ(change, top_q)."""
    position: Literal["even", "start", "end"] = "even"
    """position: where in a response its budget lies, evenly spread, on the first tokens or on the last."""
    selection_q: Annotated[float, Field(gt=0, le=1)] = 0.2
    """entropy_selection: share of a response's tokens that learn at all (arXiv 2506.01939: 0.2)."""
    reweight_alpha: Share = 0.2
    """reweight: weight of the token's probability, 0 is plain GRPO (the authors' script for this method alone has 0.2,
    with Lopti's separate updates 0.3)."""
    normalize: bool = False
    """Divide gamma by its mean over the response, so that credit moves weight without adding any."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.CREDIT.check(name)


class AlgorithmConfig(Section):
    """GRPO and its loss; names are TRL's."""

    loss_type: str = "grpo"
    """How token losses are aggregated: a file in `rlattn/losses`."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip range: the ratio is held above 1 - epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip range: the ratio is held below 1 + epsilon_high; None means `epsilon`."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the per-token KL to the reference policy (the starting weights); 0 keeps no reference."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the centred reward is divided by."""
    num_iterations: Positive = 1
    """Passes over a batch of rollouts."""
    steps_per_generation: Positive = 1
    """Optimizer steps in one pass: the batch is cut into this many mini-batches."""
    mask_truncated_completions: bool = False
    """Leave completions that hit `max_completion_length` out of the loss."""

    @field_validator("loss_type")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.LOSSES.check(name)


class PolicyConfig(Section):
    """The trained model: one DeepSpeed engine per rank, each a Ray actor."""

    ranks: Positive = 1
    """Data-parallel ranks."""
    gpus_per_rank: Annotated[float, Field(ge=0, le=1)] = 1
    """GPUs that Ray reserves for a rank; 0 runs on CPU, a fraction shares a GPU with an engine."""
    cpus_per_rank: Positive = 1
    """CPU cores that Ray reserves for a rank, and its torch threads."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after its warm-up, down to 0 at the last step."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens in one packed forward; a single longer sequence is an error."""
    logits_chunk_tokens: Positive = 1024
    """Tokens whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    """DeepSpeed's own config, passed through; keys that other fields own are refused."""
    timeout_s: Seconds = 1800
    """Longest wait for one phase (score, update) of a step."""

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, block: dict[str, Any]) -> dict[str, Any]:
        for key in block:
            if key in OWNED_DEEPSPEED_KEYS:
                raise ValueError(f"{key!r} is set by {OWNED_DEEPSPEED_KEYS[key]}; remove it from here")
        return block


class TrainerConfig(Section):
    """The loop around the step."""

    steps: Positive = 500
    """Rollout batches."""
    prompts_per_step: Positive = 64
    """Prompts in a batch; responses in a batch are this times `rollout.num_generations`."""
    eval_steps: Annotated[int, Field(ge=0)] = 50
    """Evaluate every so many steps, and before and after; 0 never evaluates."""
    eval_samples: Positive = 1
    """Completions per test problem; accuracy is their mean (avg@k) at `eval_temperature`."""
    eval_temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_tasks: list[TaskConfig] = Field(default_factory=list)
    """Further benchmarks that evaluation asks, such as `{name: math500, options: {data: DIR}}`; logged as
    `eval/<name>/accuracy`."""
    save_steps: Annotated[int, Field(ge=0)] = 50
    """Checkpoint every so many steps, and after the last; 0 saves only after the last."""
    save_total_limit: Positive = 2
    """Checkpoints kept."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers beside `metrics.jsonl`; each needs its extra."""
    log_completions: Annotated[int, Field(ge=0)] = 8
    """Completions with their token signals kept for the report at each evaluation."""


class RayConfig(Section):
    """Where actors run."""

    address: str | None = None
    """A running cluster (`auto` or `ray://...`); None starts Ray on this machine."""
    num_cpus: Positive | None = None
    """Logical CPUs of a local Ray; None means as many as the run's actors reserve, or the machine's if more."""
    placement_timeout_s: Seconds = 120
    """Longest wait for the actors' resources."""


class RunConfig(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of data order, sampling and credit controls."""
    output_dir: Path = Path("runs/default")
    """Where everything that the run writes goes."""
    task: TaskConfig = TaskConfig()
    """What is learned."""
    model: ModelConfig = ModelConfig()
    """The policy's starting point."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation."""
    signals: SignalsConfig = SignalsConfig()
    """Attention statistics."""
    credit: CreditConfig = CreditConfig()
    """Per-token credit."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Advantage and loss."""
    policy: PolicyConfig = PolicyConfig()
    """The trained model."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop."""
    ray: RayConfig = RayConfig()
    """Placement."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        responses = self.trainer.prompts_per_step * self.rollout.num_generations
        if responses % self.algorithm.steps_per_generation:
            raise ValueError(
                f"algorithm.steps_per_generation={self.algorithm.steps_per_generation} must divide the batch of "
                f"{responses} responses (trainer.prompts_per_step * rollout.num_generations)"
            )
        if responses // self.algorithm.steps_per_generation < self.policy.ranks:
            raise ValueError(
                f"policy.ranks={self.policy.ranks} is more than the {responses // self.algorithm.steps_per_generation} "
                "responses of one optimizer step; lower policy.ranks or algorithm.steps_per_generation"
            )
        longest = self.rollout.max_prompt_length + self.rollout.max_completion_length
        if self.policy.tokens_per_micro_batch < longest:
            raise ValueError(
                f"policy.tokens_per_micro_batch={self.policy.tokens_per_micro_batch} cannot hold one sequence of "
                f"max_prompt_length + max_completion_length = {longest} tokens; raise it to at least {longest}"
            )
        if self.signals.forward == "train":
            self._check_training_forward()
        return self

    def _check_training_forward(self) -> None:
        iterations, steps = self.algorithm.num_iterations, self.algorithm.steps_per_generation
        if (iterations, steps) != (1, 1):
            raise ValueError(
                "signals.forward=train needs a single optimizer step a batch, not "
                f"algorithm.num_iterations={iterations} times algorithm.steps_per_generation={steps}; set both to 1, "
                "or signals.forward to score"
            )
        if self.signals.heads.scope == "batch" and self.signals.heads.select != "all":
            raise ValueError(
                "signals.forward=train cannot have signals.heads.scope=batch, whose groups are known only after the "
                "whole batch's forward; set the scope to calibrated or sequence, or signals.forward to score"
            )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config, apply `a.b=value` overrides (values parsed as YAML) and validate.

    A bare name such as `quickstart` means the shipped `rlattn.configs` file of that name.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    return validate(RunConfig, read_tree(path, overrides))


def read_tree(path: str | Path, overrides: list[str] | None = None, shelf: str = "") -> dict[str, Any]:
    """The sections of a YAML file, or of the shipped one of that name, with `a.b=value` overrides; not validated.

    `shelf` is the folder of `rlattn.configs` where shipped files of the kind are.

    Raises:
        ConfigError: no such file, not a YAML mapping, or a malformed override.
    """
    source = _find(path, shelf)
    try:
        tree = yaml.safe_load(source.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, not {type(tree).__name__}")
    for item in overrides or []:
        override(tree, item)
    return tree


def validate(schema: type[Schema], tree: dict[str, Any]) -> Schema:
    """What a tree of sections describes: a `RunConfig`, or any other schema.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(schema, item) for item in error.errors())) from None


def describe(root: type[BaseModel], error: Any) -> str:
    """One pydantic error as a line that names the key, the value and what would be accepted."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key `{path}`{_nearest(root, error['loc'])}"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"`{path}` = {error['input']!r}: {message[0].lower()}{message[1:]}"


def differences(old: Any, new: Any, free: tuple[str, ...] = FREE, prefix: str = "") -> Iterator[str]:
    """Each key whose value differs between two trees of sections, but time-outs and those that begin with a `free`."""
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        if path.startswith(free) or path.endswith("timeout_s"):
            continue
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, free, f"{path}.")
        elif was != now:
            yield f"{path} was {was!r}, now {now!r}"


def _find(path: str | Path, shelf: str) -> Path:
    shipped = Path(__file__).parent / "configs" if (Path(__file__).parent / "configs").is_dir() else _configs_folder()
    shipped /= shelf
    for candidate in (Path(path), shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ConfigError(f"no config file at {str(path)!r}; give a YAML file or a shipped name ({', '.join(names)})")


def _configs_folder() -> Path:
    from rlattn import configs

    return Path(configs.__path__[0])


def override(tree: dict[str, Any], item: str) -> None:
    """Set one `a.b=value` (the value parsed as YAML) in a tree of sections.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r} is not of the form key=value, such as credit.top_q=0.2")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: `{section}` is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: {' '.join(str(error).split())}") from None


def _nearest(root: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    section: Any = root
    for part in loc[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    everywhere = _all_keys(root)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    prefix = ".".join(str(p) for p in loc[:-1])
    if close:
        return f"; did you mean `{prefix + '.' if prefix else ''}{close[0]}`?"
    elsewhere = difflib.get_close_matches(str(loc[-1]), list(everywhere), n=1, cutoff=0.75)
    if elsewhere:
        return f"; did you mean `{everywhere[elsewhere[0]]}`?"
    return f"; known here: {', '.join(sorted(known))}"


def _all_keys(root: type[BaseModel], prefix: str = "") -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, field in root.model_fields.items():
        keys.setdefault(name, prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for inner, path in _all_keys(field.annotation, f"{prefix}{name}.").items():
                keys.setdefault(inner, path)
    return keys
