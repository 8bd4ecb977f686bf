"""Whether the weights that arrive are those that were sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """BLAKE2b of each CPU tensor's bytes and shape, by name."""
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


def check(name_of: str, expected: Mapping[str, str], received: Mapping[str, str]) -> None:
    """Refuse what differs.

    Raises:
        ValueError: names the first tensors that are missing, or have other bytes; `name_of` is who received them.
    """
    wrong = [name for name, checksum in expected.items() if received.get(name) != checksum]
    wrong += [name for name in received if name not in expected]
    if wrong:
        raise ValueError(f"{name_of}: {len(wrong)} tensors are not what was sent: {', '.join(wrong[:5])}")


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=16)
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
