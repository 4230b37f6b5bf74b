"""Co-occurrence tables on disk: a safetensors file of delta-coded keys and packed counts, with a checksum."""

import json
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.files import atomic_write

MAX_ORDER = 4
MAX_VOCAB = 2**20  # leaves 2^43 rows per level before `parent * vocab_size + token` outgrows 63 bits
FORMAT = "dynamo-lm co-occurrence table"
VERSION = 1
HEADER = 8192  # bytes, more than the names and the description take


def pack_levels(vocab_size: int, keys: tuple[Tensor, ...], counts: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """Per level the counts and, from 2 on, the last tokens and how many children each row of the level below has."""
    arrays: dict[str, np.ndarray] = {}
    for m, (key, count) in enumerate(zip(keys, counts, strict=True), start=1):
        arrays |= _pack(f"{m}.counts", count.numpy())
        if m > 1:
            parents, tokens = np.divmod(key.cpu().numpy(), vocab_size)
            arrays[f"{m}.tokens"] = tokens.astype(np.uint16 if vocab_size <= 2**16 else np.int32)
            arrays |= _pack(f"{m}.children", np.bincount(parents, minlength=counts[m - 2].numel()))
    return arrays


def minimum_for_size(
    vocab_size: int, histograms: list[np.ndarray], minimum: tuple[int, ...], max_bytes: float
) -> tuple[int, ...]:
    """Minimum counts with which a table's file takes at most `max_bytes`: those given, or one higher number for all orders
    from 2 on, the least that does.

    histograms  by order, how many n-grams are counted 0, 1, 2 .. times; the last entry includes those counted more often.

    Raises:
        InputError: no number does.
    """
    # (orders, numbers) by order the n-grams counted so often or more
    longest = max(map(len, histograms))
    kept = np.array([np.pad(histogram, (0, longest - len(histogram)))[::-1].cumsum()[::-1] for histogram in histograms])
    token = 2 if vocab_size <= 2**16 else 4
    for least in range(1, longest):
        counts = (1, *(max(least, number) for number in minimum[1:]))
        rows = [vocab_size, *(kept[m, min(n, longest - 1)] for m, n in enumerate(counts) if m)]
        large = sum(kept[m, min(max(n, 255), longest - 1)] for m, n in enumerate(counts))
        size = HEADER + sum(rows) + 8 * large  # counts, as bytes or in the overflow list
        size += sum(above * token + below + 4 * (above // 255) for below, above in pairwise(rows))
        if size <= max_bytes:
            return counts
    raise InputError(
        f"No minimum count below {longest:,} makes a table of at most {max_bytes / 1e6:g} MB; allow more or a lower order."
    )


def _pack(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Non-negative integers as bytes; 255 stands for the next entry of the overflow list."""
    large = values[values >= 255]
    top = int(large.max(initial=0))
    width = np.uint16 if top < 2**16 else np.int32 if top < 2**31 else np.int64
    return {name: np.minimum(values, 255).astype(np.uint8), f"{name}.overflow": large.astype(width)}


def _integers(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = arrays.pop(name)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name} is not a list of integers")
    return array


def _unpack(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    short, large = _integers(arrays, name), _integers(arrays, f"{name}.overflow").astype(np.int64)
    values = short.astype(np.int64)
    if short.min(initial=0) < 0 or np.count_nonzero(short == 255) != large.size or large.min(initial=255) < 255:
        raise ValueError(f"{name} and its overflow list disagree")
    values[short == 255] = large
    return values


def unpack_levels(
    arrays: dict[str, np.ndarray], vocab_size: Any, order: Any, totals: tuple[Any, ...], min_counts: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and counts of every level; raises ValueError for anything that `pack_levels` cannot have made."""
    if not all(isinstance(n, int) and 0 <= n < 2**62 for n in (vocab_size, order, *totals, *min_counts)):
        raise ValueError("the numbers in its header are not counts")
    if not (1 <= vocab_size <= MAX_VOCAB and 1 <= order <= MAX_ORDER and len(totals) == len(min_counts) == order):
        raise ValueError("its header names an impossible vocabulary or order")
    keys, counts = [np.arange(vocab_size)], [_unpack(arrays, "1.counts")]
    for m in range(2, order + 1):
        children, tokens = _unpack(arrays, f"{m}.children"), _integers(arrays, f"{m}.tokens")
        if children.max(initial=0) > vocab_size or children.size != counts[-1].size or children.sum() != tokens.size:
            raise ValueError(f"the offsets of order {m} do not match its rows")
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
            raise ValueError(f"order {m} has tokens outside the vocabulary")
        keys.append(np.repeat(np.arange(children.size) * vocab_size, children) + tokens)
        counts.append(_unpack(arrays, f"{m}.counts"))
        if (np.diff(keys[-1]) <= 0).any():
            raise ValueError(f"the rows of order {m} are not sorted")
        if counts[-1].size != tokens.size or counts[-1].min(initial=1) < 1:
            raise ValueError(f"order {m} does not have a count for every row")
    if counts[0].size != vocab_size or arrays:
        raise ValueError("it has the wrong number of entries")
    for m, (count, total) in enumerate(zip(counts, totals, strict=True), start=1):
        if count.sum(dtype=np.float64) > total * (1 + 1e-9):  # in floating point: an altered sum may overflow int64
            raise ValueError(f"order {m} holds more n-grams than were counted")
    return tuple(map(torch.from_numpy, keys)), tuple(map(torch.from_numpy, counts))


def _checksum(arrays: dict[str, np.ndarray], facts: str) -> str:
    crc = zlib.crc32(facts.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(array.data, zlib.crc32(f"{name} {array.dtype}".encode(), crc))
    return f"{crc:08x}"


def write(path: Path, arrays: dict[str, np.ndarray], facts: str) -> None:
    """Writes arrays and a description, whole or not at all; the same ones give the same bytes.

    Raises:
        InputError: the place cannot be written to.
    """
    header = {"format": FORMAT, "facts": facts, "crc32": _checksum(arrays, facts)}
    data = save(arrays, header)
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    entries["__metadata__"] = header  # safetensors writes its entries in any order
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(memoryview(data)[8 + size :])
    except OSError as error:
        raise InputError(f"The table cannot be written to {path} ({error}); choose another place.") from error


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The description and the arrays that `write` wrote.

    Raises:
        InputError: the file is something else, or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            is_table = header.get("format") == FORMAT  # anything else may be large: do not read its tensors
            arrays = {name: file.get_tensor(name) for name in file.keys()} if is_table else {}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a co-occurrence table ({error}); check the path.") from error
    if not is_table:
        raise InputError(f"{path} is a safetensors file but not a co-occurrence table; check the path.")
    facts = header.get("facts", "")
    if header.get("crc32") != _checksum(arrays, facts):
        raise InputError(f"The table {path} is damaged (its checksum does not match); count or download it again.")
    return facts, arrays
