"""Copies between the host and a device, without needless waits."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what is queued there: when the call returns, CUDA has read what
    lies in ordinary memory. That is not documented for Apple's GPUs, nor for the way back, so these wait."""
    return tensor.to(device, non_blocking=tensor.is_cpu and device.type != "mps")


def fetched(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device on the CPU; the host waits once for all, because copies of one queue end in order."""
    if all(tensor.is_cpu for tensor in tensors):
        return list(tensors)
    *others, last = tensors
    together = last.device.type != "mps"
    return [*(tensor.to("cpu", non_blocking=together) for tensor in others), last.cpu()]
