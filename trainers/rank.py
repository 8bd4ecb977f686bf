"""One data-parallel rank of a trained model, whatever it learns: its place among the others, its DeepSpeed engine, and
what is saved of it. `PolicyWorker` says what is computed."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from rlattn.config import PolicyConfig, RunConfig
from rlattn.rollout.cluster import Place, place
from rlattn.trainers.lora import Entry, entries
from rlattn.trainers.rng import load_rng, save_rng, seed_rng

GROUP_ELEMENTS = 256 << 20  # parameters that the optimizer steps together
BUCKET_BYTES = 256 << 20  # what one gathered bucket of weights may hold on one rank


class Rank:
    """A DeepSpeed engine inside a Ray actor (deepspeed is imported there alone); a subclass loads it a model.

    Attributes:
        engine: DeepSpeed's, once loaded.
        lm: the Hugging Face model inside it.
    """

    engine: Any
    lm: PreTrainedModel

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.world = config.policy.ranks

    def place(self) -> Place:
        """Where this rank lives."""
        return place()

    def endpoint(self) -> str:
        """A free `tcp://host:port` on this rank's node, for the ranks' rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def join(self, endpoint: str) -> None:
        """Take this rank's device and meet the other ranks."""
        policy = self.config.policy
        self.device = torch.device("cuda" if policy.gpus_per_rank else "cpu")
        torch.set_num_threads(policy.cpus_per_rank)
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.world)}
        # Of a node's networks the one that Ray uses is known to reach the others; left alone, gloo takes that of the
        # host name, which may be the loopback, and NCCL the first that it finds.
        interface = interface_of(ray.util.get_node_ip_address())
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        dist.init_process_group(
            "nccl" if policy.gpus_per_rank else "gloo",
            init_method=endpoint,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=policy.timeout_s),
        )

    def save(self, folder: str) -> None:
        """Write the optimizer state to `folder`/optimizer, this process's random generators to `folder`/rng and, from
        rank 0, a Hugging Face model to `folder`/model.

        Raises:
            OSError: nothing more fits on the disk, or the folder cannot be written.
        """
        try:
            self.engine.save_checkpoint(folder, tag="optimizer", save_latest=False)
            save_rng(self._rng(folder))
            state = {name: tensor for bucket in self.buckets() for name, tensor in bucket.items()}
            if self.rank == 0:
                self.lm.save_pretrained(Path(folder, "model"), state_dict=state)
            self.save_adapter(folder)
        except (RuntimeError, SafetensorError) as error:  # what a failed write is called by torch and safetensors
            raise OSError(f"writing failed with {shutil.disk_usage(folder).free >> 20} MiB free: {error}") from error

    def save_adapter(self, folder: str) -> None:
        """Write what else a subclass keeps of its model; every rank takes part."""

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        """Dicts name -> CPU tensor of at most BUCKET_BYTES, on rank 0; every rank must iterate (ZeRO-3 gathers)."""
        for entries_of_one in self.gathered():
            if self.rank == 0:
                yield {name: make().to("cpu", copy=True) for name, _, make in entries_of_one}

    def gathered(self) -> Iterator[list[Entry]]:
        """The weights in lists of at most BUCKET_BYTES, whole until the next is asked for; every rank must iterate."""
        bucket: list[Entry] = []
        size = 0
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        everything = list(entries(self.lm))
        for i, entry in enumerate(everything):
            bucket.append(entry)
            weight = entry[1][0]
            size += getattr(weight, "ds_numel", weight.numel()) * weight.element_size()
            if size >= BUCKET_BYTES or i == len(everything) - 1:
                needed = [p for _, parameters, _ in bucket for p in parameters]
                with GatheredParameters(needed, enabled=hasattr(weight, "ds_id")):
                    yield bucket
                bucket, size = [], 0

    def trained(self, model: nn.Module, learning_rate: float) -> Any:
        """DeepSpeed's engine over `model`, with AdamW and the schedule of `policy`; restore it with `restore`."""
        import deepspeed

        policy, algorithm = self.config.policy, self.config.algorithm
        model = gathered_by_layer(model.to(self.device), policy)
        optimizer = torch.optim.AdamW(
            parameter_groups(model),
            lr=learning_rate,
            betas=policy.betas,
            eps=policy.adam_epsilon,
            weight_decay=policy.weight_decay,
            fused=True,
        )
        scheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(policy.lr_schedule, policy.lr_schedule),
            optimizer,
            num_warmup_steps=policy.lr_warmup_steps,
            num_training_steps=self.config.trainer.steps * algorithm.num_iterations * algorithm.steps_per_generation,
        )
        return deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(policy, self.config.model.dtype),
        )[0]

    def restore(self, checkpoint: str | None) -> None:
        """Take optimizer, schedule and random generators from a checkpoint's folder, where there is one.

        Where the number of ranks is another, the generators are seeded afresh, as at the start of a run.
        """
        if checkpoint:
            # What `"checkpoint": {"load_universal": true}` in DeepSpeed's config would say, known here only.
            self.engine._config.load_universal_checkpoint = Path(checkpoint, "optimizer", "zero").is_dir()
            self.engine.load_checkpoint(checkpoint, tag="optimizer")
        if checkpoint and len(list(self._rng(checkpoint).parent.glob("rank-*.pt"))) == self.world:
            load_rng(self._rng(checkpoint))
        else:
            seed_rng(self.config.seed, self.engine.global_steps, self.rank)

    def _rng(self, folder: str) -> Path:
        return Path(folder, "rng", f"rank-{self.rank}.pt")

    def frozen(self, model: nn.Module) -> nn.Module:
        """`model` for forwards alone, sharded where ZeRO-3 shards what is trained."""
        import deepspeed

        block = deepspeed_config(self.config.policy, self.config.model.dtype)
        if block.get("zero_optimization", {}).get("stage") != 3:
            return model.eval().to(self.device)
        model = gathered_by_layer(model.eval().to(self.device), self.config.policy)
        engine = deepspeed.initialize(model=model, config=block)[0]
        engine.eval()
        return engine

    def peak_memory(self) -> int:
        """Bytes of the GPU that tensors took at most since this was last asked; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def release(self) -> None:
        """Give the GPU what torch holds of it and does not use, where an engine that wakes up needs it."""
        if self.config.rollout.sleep and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def summary(self, learned: list[dict[str, float]], steps: int) -> dict[str, float]:
        """Sums over the tokens of `steps` optimizer steps, mean gradient norm, and the learning rate now."""
        names = dict.fromkeys(name for part in learned for name in part)
        sums = {name: sum(part.get(name, 0.0) for part in learned) for name in names}
        rate = self.engine.optimizer.param_groups[0]["lr"]
        return sums | {"grad_norm": sums["grad_norm"] / steps, "learning_rate": rate}

    def step(self, loss: Tensor, *, last: bool) -> dict[str, float]:
        """Backward of a micro-batch's part of a mini-batch's loss and, after the `last`, the optimizer step.

        Returns its `loss`, and after the last one the mini-batch's `grad_norm`.
        """
        learned = {"loss": loss.item()}
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks, and the parts already add to the whole mini-batch's loss.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        if last and not self.engine.zero_optimization():  # DeepSpeed reports a norm under ZeRO only
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            learned["grad_norm"] = float(torch.nn.utils.get_total_norm(gradients))
        self.engine.step()
        if last and self.engine.zero_optimization():
            learned["grad_norm"] = float(self.engine.get_global_grad_norm())
        return learned


def gathered_by_layer(model: nn.Module, policy: PolicyConfig) -> nn.Module:
    """`model`, marked so that ZeRO-3 gathers whole decoder layers, where the user's block names no `leaf_module`.

    DeepSpeed gathers each linear map on its own otherwise, which can cost more than the arithmetic.
    """
    from deepspeed.utils import set_z3_leaf_modules

    zero = policy.deepspeed.get("zero_optimization", {})
    if zero.get("stage") == 3 and "leaf_module" not in zero:
        parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
        layers = sorted({name for part in parts for name in part._no_split_modules or ()})
        if layers:
            set_z3_leaf_modules(model, layers, raise_if_not_found=False)
    return model


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """What `model` learns, in groups of about GROUP_ELEMENTS that an optimizer treats alike.

    DeepSpeed steps group by group, and makes an fp32 copy of a group's gradients.
    """
    groups: list[list[nn.Parameter]] = []
    size = GROUP_ELEMENTS
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        if size >= GROUP_ELEMENTS:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel()
    return [{"params": group} for group in groups]


def deepspeed_config(policy: PolicyConfig, dtype: str) -> dict[str, Any]:
    """The user's DeepSpeed block with what rlattn owns added: sizes of one, clipping, and the number type."""
    owned = {
        "train_micro_batch_size_per_gpu": 1,  # batches are packed and counted in tokens; DeepSpeed need not know
        "gradient_accumulation_steps": 1,
        "gradient_clipping": policy.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    defaults = {
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 40,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps what is offloaded too
    }
    return defaults | policy.deepspeed | owned


def interface_of(address: str) -> str | None:
    """The network interface that carries `address`; None where it cannot be told, as for the loopback."""
    if address.startswith("127."):
        return None
    return next((name for name, own in psutil.net_if_addrs().items() if address in {a.address for a in own}), None)
