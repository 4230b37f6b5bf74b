"""Bases that accelerate spreads over devices or offloads (`device_map`, `cpu_offload`, `disk_offload`).

Its hooks replace the `forward` of a module: they move inputs to the module's device, and weights that are elsewhere, or on
disk, there and away again. Between calls such weights are on the "meta" device. Knows accelerate's attributes and does not
import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dynamo_lm.errors import InputError


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the first part of a module that accelerate has hooked computes; None without hooks."""
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where a module with weights computes."""
    return (
        execution_device(module) or next(chain(module.parameters(), module.buffers())).device
    )  # rounded weights are buffers


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Has the weights of a module and its parts in place, where they compute."""
    offloaded = [(part, hook) for part in module.modules() for hook in _hooks(part) if getattr(hook, "offload", False)]
    for part, hook in offloaded:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in reversed(offloaded):
            hook.post_forward(part, None)


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate moves a module or a part of it."""
    return any(map(_hooks, module.modules()))


def shared_hooks(module: nn.Module) -> dict[int, Any]:
    """What a deep copy must not copy: hooks hold all weights of a module."""
    return {id(hook): hook for part in module.modules() if (hook := vars(part).get("_hf_hook")) is not None}


def forget_hooks(module: nn.Module) -> None:
    """Takes the hooks from a deep copy."""
    for part in module.modules():
        forget_own_hook(part)


def forget_own_hook(module: nn.Module) -> None:
    """Takes the hook from a copy of a module, and not from its parts."""
    if vars(module).pop("_hf_hook", None) is not None:
        for name in ("forward", "_old_forward"):
            vars(module).pop(name, None)


def check_own_forward(base: nn.Module) -> None:
    """Refuses a base whose whole forward a user has replaced: decoding calls its parts. Raises InputError."""
    if "forward" in vars(base) and not _hooks(base):
        raise InputError(
            f"The forward of {type(base).__name__} was replaced, and decoding with heads calls the base's parts; use a "
            "forward hook, or call model.base.generate."
        )


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those in tuples, lists and dictionaries, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    return type(value)(moved(each, device) for each in value) if type(value) in (tuple, list) else value


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
