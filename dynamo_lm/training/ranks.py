"""The ranks of a training run: processes that `torchrun` (or `accelerate launch`, or Slurm) starts with the same command.

In: a device and the launcher's environment variables. Out: a process group, over gloo on CPUs and NCCL on GPUs, and what
ranks do together. With one process every function here returns what it was given. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dynamo_lm.errors import InputError, first_line

LONGEST_WAIT = timedelta(days=2)  # for what the first rank does once, such as tokenizing
BROKEN = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "aborted")  # of gloo and NCCL

_store: Any = None  # the launcher's key-value store while a group of ours is up


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    """Where the ranks of the group compute: this rank's GPU, or the CPU."""
    on_gpu = dist.is_initialized() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def launched() -> int:
    """How many ranks the launcher started, whether or not they have met yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_one_machine() -> bool:
    """Whether the launcher started all ranks here."""
    return os.environ.get("LOCAL_WORLD_SIZE", str(launched())) == str(launched())


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: a machine's ranks take its GPUs in turn, unless one is named."""
    if launched() == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device, minutes: float) -> Iterator[None]:
    """The group of all ranks that were launched, while the block runs; nothing where there is one.

    Args:
        device: of this rank.
        minutes: that a rank waits for the others.

    Raises:
        InputError: the launcher's environment is not complete.
        RuntimeError: another rank ended, or did not come within `minutes`.
    """
    global _store
    if launched() == 1 or dist.is_initialized():
        yield
        return
    backend, limit = "gloo", timedelta(minutes=minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
    except (ValueError, KeyError) as error:
        raise InputError(f"WORLD_SIZE is {launched()}, but {first_line(error)}; start the ranks with torchrun.") from error
    # On one machine torchrun keeps its store, with the addresses of ranks that are gone, when it starts them again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine() else "0"
    _store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=limit)
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in BROKEN):
            raise RuntimeError(
                f"Rank {number} of {count} waited for another rank, which ended or did not come within {minutes:g} minutes "
                "(--rank-timeout): look at the messages of the other ranks. The same command goes on from the last "
                "checkpoint."
            ) from error
        raise
    dist.destroy_process_group()  # after an error the process ends, and a rank that is gone could be waited for here
    _store = None


@contextmanager
def first_rank_first(what: str) -> Iterator[None]:
    """The first rank runs the block, then the others do, so that they find what it wrote.

    No limit of the group applies: others wait as long as the first rank lives; the launcher ends them with it.

    Args:
        what: a name that no other call uses.
    """
    if size() > 1 and rank() > 0:
        _store.wait([what], LONGEST_WAIT)
    yield
    if size() > 1 and rank() == 0:
        _store.set(what, "done")


def all_done(what: str) -> None:
    """Wait until every rank has called this, as long as they live; no limit of the group applies.

    Args:
        what: a name that no other call uses.
    """
    if size() > 1:
        _store.set(f"{what} {rank()}", "done")
        _store.wait([f"{what} {number}" for number in range(size())], LONGEST_WAIT)


def share(total: int) -> range:
    """This rank's part of `total` things in order; parts differ by one at most."""
    return range(total * rank() // size(), total * (rank() + 1) // size())


def add_up(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over the ranks, and returns it."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces each parameter's gradient by its sum over the ranks; one that no rank has stays None."""
    if size() == 1:
        return
    parameters = list(parameters)
    present = add_up(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64))
    waiting = []
    for parameter, ranks in zip(parameters, present.tolist(), strict=True):
        if ranks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in waiting:
        work.wait()


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by those of the first rank."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Which flags are set on any rank."""
    return tuple(bool(number) for number in add_up(torch.tensor(flags, dtype=torch.int64)).tolist())


def of_first(value: Any) -> Any:
    """The first rank's value, which can be pickled."""
    if size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, 0)
    return holder[0]


def made_by_first(make: Callable[[], Any]) -> Any:
    """What the first rank makes, which can be pickled, on every rank.

    Raises:
        InputError: the first rank's, on every rank.
    """
    if size() == 1:
        return make()
    result: Any = None
    if rank() == 0:
        try:
            result = make()
        except InputError as error:
            result = error
    result = of_first(result)
    if isinstance(result, InputError):
        raise result
    return result


def meet() -> None:
    """Wait until every rank is here."""
    any_of(False)


def seed_step(seed: int, step: int) -> None:
    """Make torch's random numbers (dropout) a function of seed, step and rank; with one process they run on."""
    if size() > 1:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1)[0]))
