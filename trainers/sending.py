"""A rank's weights, handed to engines from where they lie in its GPU's memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from rlattn.rollout.checksums import checksums
from rlattn.rollout.transfer import Bucket
from rlattn.trainers.lora import Entry

NOTHING = Bucket([], [], [], 0, [], None)
LOOK_S = 0.0005  # between two looks at a broadcast
CHECK_S = 0.2  # between two looks at those who receive it


class Sender:
    """Goes through a rank's weights bucket by bucket.

    Weights that stay where they are while they are sent are lent, not copied. Engines may hold what they read until
    they have the rest of its layer, so what was made for a bucket is kept until the next one has been read.
    """

    def __init__(
        self, gathered: Callable[[], Iterator[list[Entry]]], *, gathers: bool, lends: bool, sends: bool, keeps: bool
    ) -> None:
        """`gathered` gives the weights from the first on, whole for a while only if it `gathers` them (ZeRO-3). With
        `lends` other processes on this GPU may read them, with `sends` this one broadcasts; else it gathers, no more.
        With `keeps` the node's memory has a copy of what was sent last, which can be sent again.
        """
        self._gathered, self._gathers, self._lends, self._sends = gathered, gathers, lends, sends
        self._keeps = keeps
        self._kept: dict[str, Tensor] = {}  # pinned
        self._left: Iterator[list[Entry]] = iter(())
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._lent: dict[str, tuple[int, tuple[Any, ...]]] = {}  # address and handle of what stays
        self._group: Any = None

    def next(self, *, first: bool, device: torch.device, check: bool, again: bool = False) -> Bucket | None:
        """Make the next bucket ready to be read, or the `first` one; None after the last.

        With `check` it has the checksums of its weights. `again` are those that were sent last, whatever was learned.
        """
        if first:
            self._left = self._sent() if again else self._gathered()
        self._before = self._now
        entries = next(self._left, None)
        if entries is None:
            self._before, self._now = {}, {}
            torch.cuda.ipc_collect()
            return None
        if not (self._lends or self._sends):
            return NOTHING
        made = {name: make().to(device) for name, _, make in entries}
        stays = {
            name
            for name, parameters, _ in entries
            if not self._gathers and made[name].data_ptr() == parameters[0].data_ptr()
        }
        self._now = {
            name: tensor if name in stays else tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in made.items()
        }
        if self._keeps and not again:
            self._keep()
        torch.cuda.synchronize(device)  # who reads does so in a process, and so a stream, of its own
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return Bucket(
            names=list(self._now),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in self._now.values()],
            shapes=[list(tensor.shape) for tensor in self._now.values()],
            size=sum(math.prod(tensor.shape) * tensor.element_size() for tensor in self._now.values()),
            handles=[
                {uuid: self._handle(name, tensor, stays=name in stays)} if self._lends else {}
                for name, tensor in self._now.items()
            ],
            checksums=checksums({name: tensor.cpu() for name, tensor in self._now.items()}) if check else None,
        )

    def _keep(self) -> None:
        for name, tensor in self._now.items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._kept[name].copy_(tensor, non_blocking=True)

    def _sent(self) -> Iterator[list[Entry]]:
        """What is kept, weight by weight: it is sent again to an engine that was rebuilt, which is rare."""
        for name, tensor in self._kept.items():
            yield [(name, [tensor], tensor.detach)]

    def _handle(self, name: str, tensor: Tensor, *, stays: bool) -> tuple[Any, ...]:
        """What opens a weight elsewhere. For one that stays it is made once: torch keeps a record of each it makes."""
        if not stays:
            return tuple(reduce_tensor(tensor)[1])
        address = tensor.data_ptr()
        if self._lent.get(name, (0, ()))[0] != address:
            self._lent[name] = address, tuple(reduce_tensor(tensor)[1])
        return self._lent[name][1]

    def meet(self, host: str, port: int, world_size: int) -> None:
        """Wait for the engines that weights are broadcast to; they come with vLLM's NCCL interface."""
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        if self._group is not None:
            self._group.destroy()
            self._group = None
        self._group = stateless_init_process_group(host, port, 0, world_size, torch.cuda.current_device())

    def broadcast(self, receivers: list[ray.ObjectRef], timeout_s: float) -> bool:
        """Send what is ready, weight by weight; False if a receiver failed or it took too long, and the group is gone.

        NCCL waits for a dead receiver for ever, so this watches them.
        """
        for tensor in self._now.values():
            self._group.broadcast(tensor.contiguous(), src=0)
        done = torch.cuda.Event()
        done.record()
        start = look = time.monotonic()
        while not done.query():
            time.sleep(LOOK_S)
            now = time.monotonic()
            if now - look > CHECK_S:
                look = now
                if now - start > timeout_s or _failed(receivers):
                    self._group.destroy()  # aborts what waits
                    self._group = None
                    return False
        return True


def _failed(receivers: list[ray.ObjectRef]) -> bool:
    answered = ray.wait(receivers, num_returns=len(receivers), timeout=0)[0]
    try:
        ray.get(answered)
    except RayError:
        return True
    return False
