"""A rank of the policy: it scores packed batches, captures attention on the way, and takes optimizer steps.

[L] captured layers, [H] query heads, [t] tokens of a micro-batch, [n] response tokens among them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from rlattn import credit
from rlattn.config import RunConfig
from rlattn.kernels import Capture, FlowMap, FlowOptions
from rlattn.losses.inputs import LossInputs
from rlattn.losses.token import micro_batch_loss
from rlattn.packing import MicroBatch
from rlattn.rollout.transfer import Bucket
from rlattn.signals import (
    HeadMeans,
    SignalRows,
    groups_of,
    pool_heads,
    receivers_of,
    reduce_rows,
    reduce_signals,
    statistics_options,
)
from rlattn.trainers.lora import adapted
from rlattn.trainers.model import PolicyModel, captured_layers, load_model
from rlattn.trainers.rank import Rank
from rlattn.trainers.sending import Sender
from rlattn.types import ExtraSignal


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


class PolicyWorker(Rank):
    """Holds a shard of the policy, scores packed batches and takes optimizer steps on them.

    `extra` are the signals that the credit strategy needs beside WAAD and FAI.
    """

    def __init__(self, config: RunConfig, rank: int, extra: tuple[ExtraSignal, ...] = ()) -> None:
        super().__init__(config, rank)
        self.extra = extra

    def load(self, endpoint: str, model_path: str, reference_path: str, checkpoint: str | None) -> None:
        """Join the other ranks, load the weights and, where given, the checkpoint's optimizer state."""
        self.join(endpoint)
        policy, signals = self.config.policy, self.config.signals
        # A checkpoint's model has the adapters merged in: they are restored beside the weights that they started from.
        self.lm = load_model(self.config.model, reference_path if policy.lora else model_path)
        self.adapters = adapted(self.lm, policy.lora, self.config.seed) if policy.lora else None
        if policy.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.bonus = self.config.algorithm.entropy_coef > 0
        model = PolicyModel(self.lm, self.config.rollout.temperature, learn_entropy=self.bonus)
        self.engine = self.trained(model, policy.learning_rate)
        self.restore(checkpoint)
        gathers = any(hasattr(parameter, "ds_id") for parameter in self.lm.parameters())  # ZeRO-3
        lends = self.config.ray.placement == "colocate"
        sends, keeps = self.rank == 0, bool(self.config.rollout.steps_ahead) and self.rank == 0
        self.sender = Sender(self.gathered, gathers=gathers, lends=lends, sends=sends, keeps=keeps)
        self.options = statistics_options(signals)
        self.layers = captured_layers(signals, self.lm.config)
        self.receivers = receivers_of(signals)
        self.reference = None
        if self.config.needs_reference and not self.adapters:
            reference = load_model(self.config.model, reference_path)
            self.reference = self.frozen(PolicyModel(reference, self.config.rollout.temperature))

    def score(self, shard: list[MicroBatch], groups: Tensor | None = None) -> ShardScores:
        """Log-probs, entropy and attention signals, all from one forward a micro-batch.

        `groups` [L, H] int8 are the head groups to use; None measures them.
        """
        self.engine.eval()
        with torch.no_grad():
            forwards = [self._measure(micro, spans=groups is None) for micro in shard]
        rows, heads = [own for *_, own in forwards], self.config.signals.heads
        reduced = reduce_signals(rows, heads, groups=groups, extra=self.extra, all_reduce=dist.all_reduce)
        columns = [part | signals for (*_, part, _), signals in zip(forwards, reduced.columns, strict=True)]
        return ShardScores(columns, self.layers, reduced.means, reduced.groups)

    def update(self, mini_batches: list[list[MicroBatch]]) -> dict[str, float]:
        """One optimizer step a mini-batch; returns `summary`."""
        learned = []
        self.engine.train()
        for micros in mini_batches:
            for micro in micros:
                logps, entropy = self.engine(micro, with_entropy=self.bonus)
                learned.append(self._learn(micro, logps, entropy, micro.columns, last=micro is micros[-1]))
        self.release()
        return self.summary(learned, len(mini_batches))

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
            logps, entropy, part, rows = self._measure(micro, spans=groups is None)
            part |= reduce_rows(rows, heads, groups, self.extra)
            part["gamma"], amplified = self._credit(micro, part, step)
            shaped = part["gamma"] * micro.columns["advantages"]
            given = micro.columns | part | {"advantages": shaped, "old_logps": part["logps"]}
            learned.append(
                self._learn(micro, logps, entropy, given, last=micro is micros[-1]) | {"amplified": amplified}
            )
            columns.append(part)
            sums.append(rows.sums)
        self.release()
        means = pool_heads(sums, dist.all_reduce)
        return ShardScores(columns, self.layers, means, groups_of(means, heads, groups)), self.summary(learned, 1)

    def _measure(
        self, micro: MicroBatch, *, spans: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor], SignalRows]:
        """One forward with capture: log-probs and entropy [n] to learn from, columns [t] for the driver, head rows."""
        columns = {}
        if self.config.needs_reference:
            columns["reference_logps"] = spread(micro, self._reference_logps(micro))
        flow = self._flow_map(micro) if "flow" in self.extra else None
        capture = Capture(self.layers, self.options, micro.response_starts, spans=spans, flow=flow)
        logps, entropy = self.engine(micro, capture=capture, with_entropy=True)
        columns |= {"logps": spread(micro, logps), "entropy": spread(micro, entropy)}
        bounds = micro.cu_seqlens, micro.response_starts
        rows = SignalRows.collect(
            capture.statistics,
            self.layers,
            *bounds,
            spans=spans,
            receivers=self.receivers,
            flow=None if flow is None else flow.flow,
        )
        return logps, entropy, columns, rows

    def _reference_logps(self, micro: MicroBatch) -> Tensor:
        """[n] under the starting weights: another model, or this one without its adapters."""
        with torch.no_grad():
            if self.adapters is None:
                assert self.reference is not None
                return self.reference(micro)[0]
            with self.adapters.disable_adapter():
                return self.engine(micro)[0]

    def _flow_map(self, micro: MicroBatch) -> FlowMap:
        """A map to gather; where a response has no answer, its last tokens stand for one."""
        settings = self.config.signals.flow
        bounds = zip(micro.answers.tolist(), micro.response_starts.tolist(), micro.cu_seqlens[1:].tolist(), strict=True)
        answers = [
            (first, last) if first < last else (max(start, end - settings.fallback_tokens), end)
            for (first, last), start, end in bounds
        ]
        options = FlowOptions(settings.threshold, settings.storage)
        return FlowMap(micro.cu_seqlens, micro.response_starts, answers, len(self.layers), options)

    def _credit(self, micro: MicroBatch, columns: dict[str, Tensor], step: int) -> tuple[Tensor, int]:
        """Gamma [t] of a micro-batch whose forward gave `columns`, and how many tokens it amplifies."""
        starts, ends = micro.cu_seqlens[:-1], micro.cu_seqlens[1:]
        advantages = micro.columns["advantages"][starts]  # one a sequence, the same on all its tokens
        responses = credit.PackedResponses(micro.response_starts, ends, micro.sequences, advantages)
        return credit.assign_packed(columns, responses, self.config.credit, seed=self.config.seed, step=step)

    def _learn(
        self, micro: MicroBatch, logps: Tensor, entropy: Tensor | None, columns: dict[str, Tensor], *, last: bool
    ) -> dict[str, float]:
        """Backward of a micro-batch's loss and, after a mini-batch's `last`, the optimizer step; sums over its tokens.

        `logps` and `entropy` are [n]; `columns`, [t] each, must have what `LossInputs` needs beside them.
        """
        rows, names = micro.response_indices, {field.name for field in fields(LossInputs)}
        given = {name: column[rows].to(self.device) for name, column in columns.items() if name in names}  # [n] each
        sequences = torch.repeat_interleave(torch.arange(len(micro.cu_seqlens) - 1), micro.response_lengths)
        given |= {"logps": logps, "sequences": sequences.to(self.device)}
        inputs = LossInputs(**(given if entropy is None else given | {"entropy": entropy}))
        loss, measured = micro_batch_loss(inputs, self.config.algorithm)
        counted = inputs.counted  # masked truncated completions are in no mean
        sums = {name: values[counted].sum().item() for name, values in measured.items()}
        sums["tokens"] = int(counted.sum())
        return sums | self.step(loss, last=last)

    def save_adapter(self, folder: str) -> None:
        """Write the adapters to `folder`/adapter in PEFT's format, from rank 0."""
        if self.adapters is None:
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        learned = [p for p in self.lm.parameters() if p.requires_grad]
        with GatheredParameters(learned, enabled=hasattr(learned[0], "ds_id")):
            if self.rank == 0:
                self.adapters.save_pretrained(str(Path(folder, "adapter")))

    def adapter(self) -> ray.ObjectRef | None:
        """The adapters as `save_adapter` writes them, file name -> bytes; a ref on rank 0, None elsewhere."""
        with TemporaryDirectory() as folder:
            self.save_adapter(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).glob("adapter/adapter_*")}
        return ray.put(files) if self.rank == 0 else None

    def weights(self) -> list[ray.ObjectRef]:
        """The whole policy in Hugging Face names, gathered bucket by bucket; refs on rank 0, none elsewhere."""
        return [ray.put(bucket) for bucket in self.buckets()]

    def next_weights(self, *, first: bool, again: bool = False) -> Bucket | None:
        """Make the next bucket of weights, or the `first` of a transfer, ready to be read from this GPU; None after the
        last. Every rank must be asked; rank 0 alone for those that were sent last, `again`.
        """
        check = self.config.rollout.check_weights
        return self.sender.next(first=first, device=self.device, check=check, again=again)

    def meet(self, host: str, port: int, world_size: int) -> None:
        """Wait for the engines that weights are broadcast to."""
        self.sender.meet(host, port, world_size)

    def broadcast(self, receivers: list[ray.ObjectRef], timeout_s: float) -> bool:
        """Send them the bucket that is ready; False if one failed or it took too long."""
        return self.sender.broadcast(receivers, timeout_s)


def spread(micro: MicroBatch, values: Tensor) -> Tensor:
    """[n] response values to [t] on the CPU, detached, 0 on prompts."""
    whole = torch.zeros(len(micro.token_ids), dtype=torch.float32)
    whole[micro.response_indices] = values.detach().float().cpu()
    return whole
