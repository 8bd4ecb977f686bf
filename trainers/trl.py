"""Attention credit inside TRL: `CreditGRPOTrainer` is TRL's `GRPOTrainer` with two keywords more.

    trainer = CreditGRPOTrainer(model, reward_funcs, args, train_dataset, credit={"name": "coupled_rhythm"})

TRL generates, scores and learns as ever; its advantages [B] become gamma * advantages [B, T], which its loss accepts.
The signals are captured in TRL's own log-prob forward, whose attention stays the model's: see `docs/trl.md`.

[B, T] completions of a batch, padded on the right, as TRL has them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rlattn import credit as strategies
from rlattn.config import ConfigError, CreditConfig, Section, SignalsConfig, validate
from rlattn.kernels import listen
from rlattn.signals import reusable_groups, trains_in_one_forward
from rlattn.trainers.listening import Listener
from rlattn.trainers.model import captured_layers


class _Options(Section):
    credit: CreditConfig
    signals: SignalsConfig


class CreditGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, each token's advantage multiplied by its attention credit.

    Args:
        args, kwargs: TRL's.
        credit: strategy and options, a `CreditConfig` or its fields as a dict; None takes the defaults.
        signals: what is captured, a `SignalsConfig` or its fields as a dict; None takes the defaults. `forward: train`
            captures in the training forward, where head groups are known beforehand.

    Raises:
        ConfigError: an option that is unknown or out of bounds, or a trainer, model or option that credit cannot work
            with; the message names its value and what is accepted.
    """

    args: Any  # a GRPOConfig; transformers types both for every trainer
    model: Any

    def __init__(
        self,
        *args: Any,
        credit: CreditConfig | dict[str, Any] | None = None,
        signals: SignalsConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = validate(_Options, {"credit": credit or {}, "signals": signals or {}})
        self.credit, self.signals = options.credit, options.signals
        super().__init__(*args, **kwargs)
        self._layers = captured_layers(self.signals, _check(self).config)
        self._extra = strategies.needed(self.credit.name)
        self._groups: Any = None  # head groups measured last
        self._listener: Listener | None = None  # waits for the next log-prob forward
        self._learning: dict[str, Any] | None = None  # the batch of that forward, where it is the training forward

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with `advantages` [B, T], unless it is the training forward that will say."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        groups = reusable_groups(self.signals.heads, self._batch_number, self._groups)
        if trains_in_one_forward(self.signals, groups):
            return _whole(super()._generate_and_score_completions(inputs))
        listener = Listener(self.signals, self._layers, self._extra, groups)
        self._listener = listener if self._scored_by_trl else None
        try:
            batch = _whole(super()._generate_and_score_completions(inputs))
        finally:
            self._listener = None
        if self._scored_by_trl != ("old_per_token_logps" in batch):
            raise RuntimeError("this version of TRL skips the old log-probs at other times than rlattn expects")
        if not self._scored_by_trl:
            self._score(batch, listener)
        batch["advantages"] = self._shaped(listener, batch)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; where no scoring forward gave credit, its own forward does, before the advantages are used."""
        if not self.model.training or inputs["advantages"].dim() > 1:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)  # TRL may learn from the same batch again
        groups = reusable_groups(self.signals.heads, self._batch_number, self._groups)
        self._listener = Listener(self.signals, self._layers, self._extra, groups)
        self._learning = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._listener = self._learning = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, heard by the listener that waits; only once, so that a reference policy is never captured."""
        listener, self._listener = self._listener, None
        if listener is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        result = super()._get_per_token_logps_and_entropies(listener.to(model), *args, **kwargs)
        if self._learning is not None:
            self._learning["advantages"] = self._shaped(listener, self._learning)
        return result

    @property
    def _generate_every(self) -> int:
        """Micro-batches between two generations."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def _scored_by_trl(self) -> bool:
        """Whether TRL itself computes old log-probs when it has generated: its own condition."""
        correction = self.use_vllm and self.vllm_importance_sampling_correction
        return bool(self.args.gradient_accumulation_steps % self._generate_every) or correction

    @property
    def _micro_step(self) -> int:
        """Micro-batches learned so far, also before a checkpoint that the run was resumed from."""
        accumulation = self.args.gradient_accumulation_steps
        return self.state.global_step * accumulation + self._step % accumulation

    @property
    def _batch_number(self) -> int:
        return self._micro_step // self._generate_every

    def _score(self, batch: dict[str, Any], listener: Listener) -> None:
        """The log-prob forward that TRL skips because it would only repeat the training forward's values."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # [B, P+T]
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        cuda = [ids.device] if ids.is_cuda else []
        # A model with dropout draws: the draws of the training forward must stay plain TRL's.
        with (
            torch.no_grad(),
            torch.random.fork_rng(cuda),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            self._listener = listener
            self._get_per_token_logps_and_entropies(
                self.model,
                ids,
                mask,
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
            )

    def _shaped(self, listener: Listener, batch: dict[str, Any]) -> Tensor:
        """gamma * advantages, [B, T] or, where gamma is 1 everywhere, [B, 1]; logs what credit and signals are."""
        advantages, ranks = batch["advantages"], self.accelerator.num_processes
        paid = listener.pay(
            advantages,
            self.credit,
            seed=self.args.seed,
            step=self._micro_step,
            first=self.accelerator.process_index * len(advantages),
            previous=None if self._learning else self._groups,  # what single micro-batches group is no turnover
            all_reduce=dist.all_reduce if ranks > 1 else None,
        )
        if listener.groups is None:
            self._groups = paid.groups
        values = torch.tensor(list(paid.metrics.values()), dtype=torch.float32, device=advantages.device)
        if ranks > 1:
            values = self.accelerator.reduce(values, "mean")
        for name, value in zip(paid.metrics, values.tolist(), strict=True):
            self._metrics["train"][name].append(value)
        gamma = paid.gamma[:, -batch["completion_ids"].size(1) :].to(advantages)
        # [B, 1], as TRL has them, where there is no credit: else sums over tokens would round another way.
        return advantages[:, None] if (gamma == 1).all() else gamma * advantages[:, None]


def with_credit(trainer: type[GRPOTrainer] = GRPOTrainer) -> type[CreditGRPOTrainer]:
    """`trainer`, TRL's `GRPOTrainer` or a subclass, with the keywords `credit` and `signals` of `CreditGRPOTrainer`.

    Raises:
        ConfigError: another class.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, GRPOTrainer)):
        raise ConfigError(f"with_credit({trainer!r}): accepted are trl.GRPOTrainer and its subclasses")
    if issubclass(CreditGRPOTrainer, trainer):
        return CreditGRPOTrainer
    return type(f"Credit{trainer.__name__}", (CreditGRPOTrainer, trainer), {})


def _check(trainer: CreditGRPOTrainer) -> PreTrainedModel:
    """The bare model, if credit can work with it and with the trainer's options."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    for name, value in (("tools", trainer.tools), ("environment_factory", trainer.environment_factories)):
        if value:
            raise ConfigError(
                f"`{name}` = {value!r}: credit is for completions that the policy wrote as a whole, and tools write "
                "into them; accepted is None"
            )
    if trainer._is_vlm:
        raise ConfigError(
            f"`processing_class` = {type(trainer.processing_class).__name__}: images are not supported; accepted is a "
            "tokenizer, for text alone"
        )
    if args.torch_compile:
        raise ConfigError("`torch_compile` = True: a compiled model cannot be listened to; accepted is False")
    if is_peft_model(model):
        for name, adapter in model.peft_config.items():
            if adapter.is_prompt_learning:
                raise ConfigError(
                    f"`peft_config` = {type(adapter).__name__} ({name!r}): virtual tokens would count as the prompt's; "
                    "accepted are adapters of layers, such as LoraConfig"
                )
        model = model.get_base_model()
    if not model._can_set_attn_implementation():
        raise ConfigError(
            f"`model` = {type(model).__name__}: it does not use transformers' attention interface; accepted are models "
            "that do (Qwen, Llama, Mistral, ...)"
        )
    shape = model.config.get_text_config()
    if getattr(shape, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"`model` = {type(model).__name__}: `attn_logit_softcapping` = {shape.attn_logit_softcapping} is not "
            "supported; accepted is a model without"
        )
    try:
        listen(shape._attn_implementation)
    except ValueError as error:
        raise ConfigError(f"`model` = {type(model).__name__}: {error}") from None
    if trainer.signals.forward == "train" and args.gradient_accumulation_steps % trainer._generate_every:
        raise ConfigError(
            f"`signals.forward` = 'train': needs batches that take a single optimizer step, but steps_per_generation="
            f"{args.steps_per_generation} * num_iterations={trainer.num_iterations} does not divide "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}; accepted is 'score', or settings that do"
        )
    return model


def _whole(batch: dict[str, Any]) -> dict[str, Any]:
    if "tool_mask" in batch:
        raise ValueError(
            "`rollout_func` returned `env_mask`: parts of the completions are not the policy's. Credit is for "
            "completions that the policy wrote as a whole; leave `env_mask` out, or train without credit"
        )
    return batch
