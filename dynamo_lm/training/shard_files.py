"""Tensors and shards in a folder, through torch.distributed.checkpoint: every rank writes and reads its own parts.

Whoever reads may be another number of ranks, or one process with whole tensors. The folder's index is a pickle, so a
folder from elsewhere is not safe to open.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save

from dynamo_lm.errors import first_line

ERRORS = (OSError, RuntimeError)  # of reading and writing, on any rank


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors by name; every rank calls it, and it ends when all have written."""
    with _errors_of_ranks():
        save(tensors, storage_writer=FileSystemWriter(folder), no_dist=not dist.is_initialized())


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors in a folder and their whole shapes."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors or shards in place; every rank calls it."""
    with _errors_of_ranks():
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())


@contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """Turns torch's collection of errors, which is no Exception, into one; one process needs no warning that it is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        texts = {f"rank {rank}: {first_line(failure)}" for rank, (failure, _) in error.failures.items()}
        raise RuntimeError("; ".join(sorted(texts))) from error
