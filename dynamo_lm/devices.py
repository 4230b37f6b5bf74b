"""Copies between the host and a device, without needless waits, and how much memory is free."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

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


def device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has; None for others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take on a device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None
