"""The trained model on DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlattn.config.section import Positive, Seconds, Section, Share

# DeepSpeed keys that other parts of this tree own; setting them twice would mean that one of the two is ignored.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "trainer.prompts_per_step and rollout.num_generations",
    "train_micro_batch_size_per_gpu": "policy.tokens_per_micro_batch",
    "gradient_accumulation_steps": "policy.tokens_per_micro_batch",
    "gradient_clipping": "policy.max_grad_norm",
    "optimizer": "policy.learning_rate, policy.betas, policy.adam_epsilon and policy.weight_decay",
    "scheduler": "policy.lr_schedule and policy.lr_warmup_steps",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}

MAX_SERVED_RANK = 512  # the largest `max_lora_rank` that vLLM takes


class LoRAConfig(Section):
    """Low-rank adapters; names are PEFT's. The weights themselves stay as they are."""

    r: Positive = 16
    """Rank of an adapter."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """An adapter's product counts lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that training drops; old log-probs are scored without."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get one: names such as [q_proj, v_proj], or every linear layer but the head."""
    sync: Literal["merged", "adapter"] = "merged"
    """What engines are given after a step: whole weights with the adapters added in, or the adapters alone, which vLLM
    then applies beside the weights that it loaded."""

    @model_validator(mode="after")
    def _served(self) -> LoRAConfig:
        if self.sync == "adapter" and self.r > MAX_SERVED_RANK:
            raise ValueError(f"sync=adapter: vLLM serves r up to {MAX_SERVED_RANK}, not {self.r}; use sync=merged")
        return self


class PolicyConfig(Section):
    """The trained model: one DeepSpeed engine per rank, each a Ray actor."""

    ranks: Positive = 1
    """Data-parallel ranks."""
    gpus_per_rank: Annotated[float, Field(ge=0, le=1)] = 1
    """GPUs that Ray reserves for a rank; 0 runs on CPU, a fraction shares a GPU, see `ray.placement`."""
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
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term beside the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens in one packed forward; a single longer sequence is an error."""
    logits_chunk_tokens: Positive = 1024
    """Tokens whose logits exist at one time."""
    lora: LoRAConfig | None = None
    """Learn low-rank adapters in place of the weights; None learns the weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    """DeepSpeed's own config, passed through; keys that other fields own are refused."""
    timeout_s: Seconds = 1800
    """Longest wait for one phase (score, update) of a step."""

    @property
    def sends_adapters(self) -> bool:
        """Engines keep the weights that they loaded, and are given adapters alone."""
        return self.lora is not None and self.lora.sync == "adapter"

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, block: dict[str, Any]) -> dict[str, Any]:
        for key in block:
            if key in OWNED_DEEPSPEED_KEYS:
                raise ValueError(f"{key!r} is set by {OWNED_DEEPSPEED_KEYS[key]}; remove it from here")
        return block
