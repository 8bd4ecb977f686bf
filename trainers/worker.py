"""One data-parallel rank of the policy: a DeepSpeed engine inside a Ray actor (deepspeed is imported there alone).

[L] captured layers, [H] query heads, [t] tokens of a micro-batch, [n] response tokens among them.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import get_scheduler

from rlattn import credit
from rlattn.config import PolicyConfig, RunConfig
from rlattn.kernels import Capture, StatisticsOptions
from rlattn.losses import kl_k3, policy_loss
from rlattn.signals import HeadMeans, SignalRows, groups_of, pool_heads, reduce_rows, reduce_signals
from rlattn.trainers.model import PolicyModel, captured_layers, load_model
from rlattn.trainers.packing import MicroBatch
from rlattn.types import ExtraSignal

BUCKET_BYTES = 256 << 20  # what one gathered bucket of weights may hold on one rank


@dataclass(frozen=True)
class ShardScores:
    """One rank's part of `rlattn.types.Scores`: per-token values by micro-batch [t], statistics of the whole batch.

    Columns are `logps`, `entropy`, `waad`, `fai` and the extra signals; with a KL term `reference_logps`; and from
    `train` also `gamma`.
    """

    columns: list[dict[str, Tensor]]
    layers: list[int]
    means: HeadMeans
    groups: Tensor


class PolicyWorker:
    """Holds a shard of the policy, scores packed batches and takes optimizer steps on them.

    `extra` are the signals that the credit strategy needs beside WAAD and FAI.
    """

    def __init__(self, config: RunConfig, rank: int, extra: tuple[ExtraSignal, ...] = ()) -> None:
        self.config, self.rank, self.extra = config, rank, extra
        self.world = config.policy.ranks

    def endpoint(self) -> str:
        """A free `tcp://host:port` on this rank's node, for the ranks' rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def load(self, endpoint: str, model_path: str, reference_path: str, checkpoint: str | None) -> None:
        """Join the other ranks, load the weights and, where given, the checkpoint's optimizer state."""
        policy = self.config.policy
        self.device = torch.device("cuda" if policy.gpus_per_rank else "cpu")
        torch.set_num_threads(policy.cpus_per_rank)
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.world)}
        dist.init_process_group(
            "nccl" if policy.gpus_per_rank else "gloo",
            init_method=endpoint,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=policy.timeout_s),
        )
        self.model = PolicyModel(load_model(self.config.model, model_path), self.config.rollout.temperature)
        if policy.gradient_checkpointing:
            self.model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine = self._engine(self.model)
        if checkpoint:
            self.engine.load_checkpoint(checkpoint, tag="optimizer")
        signals = self.config.signals
        self.options = StatisticsOptions(signals.waad_window, signals.fai_low, signals.fai_high, signals.sink_tokens)
        self.layers = captured_layers(signals, self.model.lm.config)
        self.receivers = signals.fai_low if signals.heads.select == "receiver" else None
        self.reference = self._reference(reference_path) if self.config.algorithm.beta else None

    def score(self, shard: list[MicroBatch], groups: Tensor | None = None) -> ShardScores:
        """Log-probs, entropy and attention signals, all from one forward a micro-batch.

        `groups` [L, H] int8 are the head groups to use; None measures them.
        """
        self.engine.eval()
        with torch.no_grad():
            forwards = [self._measure(micro, spans=groups is None) for micro in shard]
        rows, heads = [own for _, _, own in forwards], self.config.signals.heads
        reduced = reduce_signals(rows, heads, groups=groups, extra=self.extra, all_reduce=dist.all_reduce)
        columns = [part | signals for (_, part, _), signals in zip(forwards, reduced.columns, strict=True)]
        return ShardScores(columns, self.layers, reduced.means, reduced.groups)

    def update(self, mini_batches: list[list[MicroBatch]]) -> dict[str, float]:
        """One optimizer step a mini-batch; returns `_summary`."""
        learned = []
        self.engine.train()
        for micros in mini_batches:
            for micro in micros:
                logps, _ = self.engine(micro)
                learned.append(self._learn(micro, logps, micro.columns, last=micro is micros[-1]))
        return self._summary(learned, len(mini_batches))

    def train(self, micros: list[MicroBatch], groups: Tensor | None, step: int) -> tuple[ShardScores, dict[str, float]]:
        """One optimizer step that also scores: what a micro-batch's forward captures gives gamma before its loss.

        The forward's own log-probs are the old ones. `groups` is as in `score`, and None only where `reduce_rows` can
        do without; the `advantages` of `micros` have no credit in them yet. Returns what `score` and `update` would,
        and the number of `amplified` tokens beside.
        """
        heads = self.config.signals.heads
        columns, sums, learned = [], [], []
        self.engine.train()
        for micro in micros:
            logps, part, rows = self._measure(micro, spans=groups is None)
            part |= reduce_rows(rows, heads, groups, self.extra)
            part["gamma"], amplified = self._credit(micro, part, step)
            shaped = part["gamma"] * micro.columns["advantages"]
            given = micro.columns | part | {"advantages": shaped, "old_logps": part["logps"]}
            learned.append(self._learn(micro, logps, given, last=micro is micros[-1]) | {"amplified": amplified})
            columns.append(part)
            sums.append(rows.sums)
        means = pool_heads(sums, dist.all_reduce)
        return ShardScores(columns, self.layers, means, groups_of(means, heads, groups)), self._summary(learned, 1)

    def _measure(self, micro: MicroBatch, *, spans: bool) -> tuple[Tensor, dict[str, Tensor], SignalRows]:
        """One forward with capture: log-probs [n] to learn from, columns [t] for the driver, and per-head rows."""
        columns = {}
        if self.reference is not None:
            with torch.no_grad():
                columns["reference_logps"] = _spread(micro, self.reference(micro)[0])
        capture = Capture(self.layers, self.options, micro.response_starts, spans=spans)
        logps, entropy = self.engine(micro, capture=capture, with_entropy=True)
        columns |= {"logps": _spread(micro, logps), "entropy": _spread(micro, entropy)}
        bounds = micro.cu_seqlens, micro.response_starts
        rows = SignalRows.collect(capture.statistics, self.layers, *bounds, spans=spans, receivers=self.receivers)
        return logps, columns, rows

    def _credit(self, micro: MicroBatch, columns: dict[str, Tensor], step: int) -> tuple[Tensor, int]:
        """Gamma [t] of a micro-batch whose forward gave `columns`, and how many tokens it amplifies."""
        starts, ends = micro.cu_seqlens[:-1], micro.cu_seqlens[1:]
        advantages = micro.columns["advantages"][starts]  # one a sequence, the same on all its tokens
        responses = credit.PackedResponses(micro.response_starts, ends, micro.sequences, advantages)
        return credit.assign_packed(columns, responses, self.config.credit, seed=self.config.seed, step=step)

    def _learn(self, micro: MicroBatch, logps: Tensor, columns: dict[str, Tensor], *, last: bool) -> dict[str, float]:
        """Backward of a micro-batch's loss and, after a mini-batch's `last`, the optimizer step; sums over its tokens.

        `logps` is [n]; `columns`, [t] each, must have `weights`, `old_logps`, `advantages` and, with a KL term,
        `reference_logps`.
        """
        algorithm, rows = self.config.algorithm, micro.response_indices
        given = {name: column[rows].to(self.device) for name, column in columns.items()}  # [n] each
        counted = given["weights"] != 0  # masked truncated completions are in no mean
        sums: dict[str, float] = {}
        token_loss, clipped = policy_loss(
            logps,
            given["old_logps"],
            given["advantages"],
            epsilon=algorithm.epsilon,
            epsilon_high=algorithm.epsilon_high,
        )
        if algorithm.beta:
            kl = kl_k3(logps, given["reference_logps"], given["old_logps"])
            token_loss = token_loss + algorithm.beta * kl
            sums["kl"] = kl[counted].sum().item()
        loss = (given["weights"] * token_loss).sum()
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks, and the weights already add to the whole mini-batch's loss.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        if last and not self.engine.zero_optimization():  # DeepSpeed reports a norm under ZeRO only
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            sums["grad_norm"] = float(torch.nn.utils.get_total_norm(gradients))
        self.engine.step()
        if last and self.engine.zero_optimization():
            sums["grad_norm"] = float(self.engine.get_global_grad_norm())
        return sums | {
            "loss": loss.item(),
            "tokens": int(counted.sum()),
            "clip_low": clipped.low[counted].sum().item(),
            "clip_high": clipped.high[counted].sum().item(),
        }

    def _summary(self, learned: list[dict[str, float]], steps: int) -> dict[str, float]:
        """Sums over the response tokens of `steps` optimizer steps, mean gradient norm, and the learning rate now."""
        sums = {name: sum(part.get(name, 0.0) for part in learned) for name in learned[-1]}
        rate = self.engine.optimizer.param_groups[0]["lr"]
        return sums | {"grad_norm": sums["grad_norm"] / steps, "learning_rate": rate}

    def weights(self) -> list[ray.ObjectRef]:
        """The whole policy in Hugging Face names, gathered bucket by bucket; refs on rank 0, none elsewhere."""
        return [ray.put(bucket) for bucket in self._buckets()]

    def save(self, folder: str) -> None:
        """Write the optimizer state to `folder`/optimizer and, from rank 0, a Hugging Face model to `folder`/model.

        Raises:
            OSError: nothing more fits on the disk, or the folder cannot be written.
        """
        try:
            self.engine.save_checkpoint(folder, tag="optimizer", save_latest=False)
            state = {name: tensor for bucket in self._buckets() for name, tensor in bucket.items()}
            if self.rank == 0:
                self.model.lm.save_pretrained(Path(folder, "model"), state_dict=state)
        except (RuntimeError, SafetensorError) as error:  # what a failed write is called by torch and safetensors
            raise OSError(f"writing failed with {shutil.disk_usage(folder).free >> 20} MiB free: {error}") from error

    def _buckets(self) -> Any:
        """Dicts name -> CPU tensor of at most BUCKET_BYTES, on rank 0; every rank must iterate (ZeRO-3 gathers)."""
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        named = list(self.model.lm.named_parameters())
        for i, (name, parameter) in enumerate(named):
            bucket.append((name, parameter))
            size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            if size >= BUCKET_BYTES or i == len(named) - 1:
                with GatheredParameters([p for _, p in bucket], enabled=hasattr(parameter, "ds_id")):
                    if self.rank == 0:
                        yield {n: p.detach().to("cpu", copy=True) for n, p in bucket}
                bucket, size = [], 0

    def _engine(self, model: PolicyModel) -> Any:
        import deepspeed

        policy = self.config.policy
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=policy.learning_rate, betas=policy.betas, weight_decay=policy.weight_decay
        )
        algorithm, trainer = self.config.algorithm, self.config.trainer
        scheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(policy.lr_schedule, policy.lr_schedule),
            optimizer,
            num_warmup_steps=policy.lr_warmup_steps,
            num_training_steps=trainer.steps * algorithm.num_iterations * algorithm.steps_per_generation,
        )
        engine, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(policy, self.config.model.dtype),
        )
        return engine

    def _reference(self, path: str) -> torch.nn.Module:
        import deepspeed

        model = PolicyModel(load_model(self.config.model, path), self.config.rollout.temperature).eval()
        block = deepspeed_config(self.config.policy, self.config.model.dtype)
        if block.get("zero_optimization", {}).get("stage") != 3:
            return model.to(self.device)
        engine = deepspeed.initialize(model=model.to(self.device), config=block)[0]
        engine.eval()
        return engine


def deepspeed_config(policy: PolicyConfig, dtype: str) -> dict[str, Any]:
    """The user's DeepSpeed block with what rlattn owns added: sizes of one, clipping, and the number type."""
    owned = {
        "train_micro_batch_size_per_gpu": 1,  # batches are packed and counted in tokens; DeepSpeed need not know
        "gradient_accumulation_steps": 1,
        "gradient_clipping": policy.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    return {"data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 1 << 40} | policy.deepspeed | owned


def _spread(micro: MicroBatch, values: Tensor) -> Tensor:
    """[n] response values to [t] on the CPU, detached, 0 on prompts."""
    whole = torch.zeros(len(micro.token_ids), dtype=torch.float32)
    whole[micro.response_indices] = values.detach().float().cpu()
    return whole
