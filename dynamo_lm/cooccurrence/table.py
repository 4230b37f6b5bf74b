"""Co-occurrence tables: how often token pairs, triples and quadruples follow each other (method.md section 3).

In: sorted n-gram counts, made by `counting.count`. Out: row ids, log frequencies and log co-occurrence weights of any
candidate tuples, as tensors on any device. Knows token ids, and no model, tokenizer or text.

A table is a trie of sorted levels. The rows of level 1 are the token ids. A row of level m is a pair (parent row of
level m-1, token), stored as the integer `parent * vocab_size + token`, so that one binary search extends any (m-1)-gram
by any token. Minimum counts never decrease with the order, hence the prefix of every kept n-gram is kept too.

On disk (safetensors): per level the last tokens, the number of children per parent row and the counts, the latter two
as one byte each with an overflow list; about four bytes per row. A checksum covers all of it.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dynamo_lm.cooccurrence import storage
from dynamo_lm.cooccurrence.lookup import Lookup
from dynamo_lm.errors import InputError


@dataclass(frozen=True, eq=False)
class Cooccurrence:
    """N-gram counts up to `order`; every tuple field holds one entry per order, the unigrams first. Never modified."""

    vocab_size: int
    keys: tuple[Tensor, ...]  # (rows,) int64, increasing: parent row * vocab_size + token; level 1: 0 .. vocab_size-1
    counts: tuple[Tensor, ...]  # (rows,) int64, on the CPU: only merging, pruning and saving need them
    totals: tuple[int, ...]  # m-grams counted, before pruning
    min_counts: tuple[int, ...]  # rarer n-grams were dropped; unigrams never are
    tokenizer: str = ""  # the caller's fingerprint of the tokenizer; "" = unknown
    description: str = ""  # what was counted, in words

    @cached_property
    def log_frequencies(self) -> tuple[Tensor, ...]:
        """Natural logs of count / total, (rows,) float32 per order, beside `keys`."""
        logs = [(count.double() / max(total, 1)).log() for count, total in zip(self.counts, self.totals, strict=True)]
        return tuple(log.float().to(keys.device) for log, keys in zip(logs, self.keys, strict=True))

    @cached_property
    def lookup(self) -> Lookup:
        """The table as arrays on the CPU, for the sampler; made when it is first read."""
        keys, logs = ([level.cpu().numpy() for level in stored] for stored in (self.keys, self.log_frequencies))
        return Lookup(self.vocab_size, keys, logs, self.totals)

    @property
    def order(self) -> int:
        """The longest n-gram in the table, 1 to 4."""
        return len(self.keys)

    @property
    def pruned_mass(self) -> tuple[float, ...]:
        """Per order, the fraction of n-gram occurrences that the minimum counts dropped (method.md section 6.5)."""
        return tuple(1 - int(c.sum()) / t if t else 0.0 for c, t in zip(self.counts, self.totals, strict=True))

    def total(self, order: int) -> int:
        """The number of n-grams of this order that were counted, the pruned ones included."""
        return self.totals[self._level(order)]

    def num_rows(self, order: int) -> int:
        """The number of distinct n-grams kept at this order; for order 1 the vocabulary size."""
        return self.keys[self._level(order)].numel()

    def extend(self, rows: Tensor, tokens: Tensor, order: int) -> Tensor:
        """Row ids of the n-grams made by appending `tokens` to the (order-1)-grams `rows`.

        `rows` and `tokens` are integer tensors that broadcast together to the result's shape. A row of -1 (unseen), a
        token outside the vocabulary and an n-gram that is not in the table all give -1. Raises InputError for an order
        below 2 or beyond the table's.
        """
        if order < 2:
            raise InputError(f"A shorter n-gram is extended to order 2 or more, not {order}; rows of 1 are token ids.")
        keys = self.keys[self._level(order)]
        children = rows.long() * self.vocab_size + tokens
        if keys.numel() == 0:
            return torch.full_like(children, -1)
        positions = torch.searchsorted(keys, children).clamp_(max=keys.numel() - 1)
        hit = (keys[positions] == children) & (rows >= 0) & (tokens >= 0) & (tokens < self.vocab_size)
        return positions.where(hit, -1)

    def log_p(self, rows: Tensor, order: int) -> Tensor:
        """Natural log of the frequency p^ (count / total of that order) of `rows`, float32 of the same shape.

        -inf for rows of -1, for ids that are no row, and for tokens that were never counted.
        """
        logs = self.log_frequencies[self._level(order)]
        if logs.numel() == 0:
            return torch.full(rows.shape, -torch.inf, device=rows.device)
        exists = (rows >= 0) & (rows < logs.numel())
        return logs[rows.clamp(0, logs.numel() - 1)].where(exists, -torch.inf)

    def to(self, device: torch.device | str) -> "Cooccurrence":
        """The same table with everything that look-ups read on `device`; the counts stay on the CPU."""
        return replace(self, keys=tuple(keys.to(device) for keys in self.keys))

    def prune(self, min_counts: "dict[int, int] | int") -> "Cooccurrence":
        """Drop the n-grams (orders 2 and up) that were counted fewer than `min_counts` times; totals stay.

        `min_counts` as in `counting.count`; what an earlier pruning dropped does not come back. Always on the CPU.
        """
        minimum = check_min_counts(min_counts, self.order)
        new_row = torch.arange(self.vocab_size)  # (rows of the level below,) its row ids after pruning
        keys, counts = [new_row], [self.counts[0]]
        for m in range(2, self.order + 1):
            keep = self.counts[m - 1] >= minimum[m - 1]
            kept = self.keys[m - 1].cpu()[keep]
            keys.append(new_row[kept // self.vocab_size] * self.vocab_size + kept % self.vocab_size)
            counts.append(self.counts[m - 1][keep])
            new_row = keep.cumsum(0) - 1
        merged = tuple(map(max, self.min_counts, minimum))
        return replace(self, keys=tuple(keys), counts=tuple(counts), min_counts=merged)

    @staticmethod
    def merge(*tables: "Cooccurrence") -> "Cooccurrence":
        """The table of all the tables' documents together; exact if none was pruned, else a lower bound. On the CPU.

        Raises InputError if the tables differ in vocabulary size, order or (known) tokenizer.
        """
        if len({(table.vocab_size, table.order) for table in tables}) != 1:
            raise InputError("Tables can be merged only if there is one at least and vocabulary size and order agree.")
        tokenizers = {table.tokenizer for table in tables} - {""}
        if len(tokenizers) > 1:
            raise InputError(f"The tables come from different tokenizers ({', '.join(sorted(tokenizers))}); recount one.")
        vocab_size, order = tables[0].vocab_size, tables[0].order
        new_rows = [torch.arange(vocab_size)] * len(tables)  # per table: merged row ids of the level below
        keys, counts = [new_rows[0]], [torch.stack([table.counts[0] for table in tables]).sum(0)]
        for m in range(2, order + 1):
            old = [table.keys[m - 1].cpu() for table in tables]
            moved = [new[k // vocab_size] * vocab_size + k % vocab_size for new, k in zip(new_rows, old, strict=True)]
            union, inverse = torch.unique(torch.cat(moved), return_inverse=True)
            added = torch.cat([table.counts[m - 1] for table in tables])
            keys.append(union)
            counts.append(torch.zeros_like(union).index_add_(0, inverse, added))
            new_rows = list(inverse.split([k.numel() for k in old]))
        return Cooccurrence(
            vocab_size, tuple(keys), tuple(counts),
            totals=tuple(map(sum, zip(*(table.totals for table in tables), strict=True))),
            min_counts=tuple(map(max, zip(*(table.min_counts for table in tables), strict=True))),
            tokenizer=next(iter(tokenizers), ""),
            description=" + ".join(dict.fromkeys(table.description for table in tables if table.description)),
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to `path`, whole or not at all. Raises InputError if the place cannot be written."""
        names = ("vocab_size", "order", "totals", "min_counts", "pruned_mass", "tokenizer", "description")
        facts = {"version": storage.VERSION, **{name: getattr(self, name) for name in names}}
        storage.write(Path(path), storage.pack_levels(self.vocab_size, self.keys, self.counts), json.dumps(facts))

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect_tokenizer: str | None = None) -> "Cooccurrence":
        """Read a table written by `save`. Raises InputError for anything else, and for a damaged or altered file.

        If both `expect_tokenizer` and the table's own fingerprint are known they must agree.
        """
        text, arrays = storage.read(Path(path))
        try:
            facts = json.loads(text)
            version, tokenizer, description = facts["version"], facts["tokenizer"], facts["description"]
            if version == storage.VERSION:
                vocab_size, totals, min_counts = facts["vocab_size"], tuple(facts["totals"]), tuple(facts["min_counts"])
                keys, counts = storage.unpack_levels(arrays, vocab_size, facts["order"], totals, min_counts)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"The table {path} contradicts itself ({error}); count or download it again.") from error
        if version != storage.VERSION:
            raise InputError(f"The table {path} has format version {version}, not {storage.VERSION}; count again.")
        if expect_tokenizer and tokenizer and tokenizer != expect_tokenizer:
            raise InputError(
                f"The table {path} counts tokens of tokenizer {tokenizer}, not {expect_tokenizer}; "
                "count one with the model's own tokenizer."
            )
        return cls(vocab_size, keys, counts, totals, min_counts, tokenizer, description)

    def __eq__(self, other: object) -> bool:
        """Same counts of the same thing; the description and the device do not matter."""
        if not isinstance(other, Cooccurrence):
            return NotImplemented
        facts, other_facts = ((t.vocab_size, t.totals, t.min_counts, t.tokenizer) for t in (self, other))
        pairs = zip((*self.keys, *self.counts), (*other.keys, *other.counts), strict=False)
        return facts == other_facts and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # equality compares tensors

    def _level(self, order: int) -> int:
        if not 1 <= order <= self.order:
            raise InputError(f"The table holds n-grams of 1 to {self.order} tokens, not {order}; count a larger order.")
        return order - 1


def check_min_counts(min_counts: "dict[int, int] | int", order: int) -> tuple[int, ...]:
    """One minimum count per order 1 .. `order` from a number (for all orders from 2) or a dictionary {order: count}.

    An order left out takes the minimum of the order below. Raises InputError where the minimum would fall with the
    order, because an n-gram could then be kept without its prefix.
    """
    given = min_counts if isinstance(min_counts, dict) else dict.fromkeys(range(2, order + 1), int(min_counts))
    if unknown := sorted(set(given) - set(range(1, order + 1))):
        raise InputError(f"Minimum counts are given for orders {unknown}, but the table ends at order {order}.")
    result = [given.get(1, 1)]
    for m in range(2, order + 1):
        result.append(given.get(m, result[-1]))
    if result[0] != 1 or result != sorted(result):
        raise InputError(f"Minimum counts must start at 1 for single tokens and not fall with the order, not {result}.")
    return tuple(result)
