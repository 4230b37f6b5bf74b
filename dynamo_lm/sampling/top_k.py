"""The top-k candidates of every head, and the pairwise correction that a learned coupling adds to them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader

# What a learned coupling adds: (head 2..n, candidates of the head before it (p,), its own (k,)) -> logits (p, k) float64.
PairwiseCorrection = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


HOSTS = ("cpu", "mps")  # devices whose memory is the host's


@dataclass(frozen=True)
class HeadCandidates:
    """The k candidates of each of n heads, by decreasing probability, equal ones by increasing token id."""

    ids: np.ndarray  # (n, k) int64 token ids
    probs: np.ndarray  # (n, k) float64, each row sums to 1
    conditionals: tuple[np.ndarray, ...] = ()  # per head from the second: (k, k) log f_i(x | the previous head's candidate)

    def coupled(self, pairwise: PairwiseCorrection, temperature: float) -> "HeadCandidates":
        """These candidates, each head's given its predecessor's: f_i(x) * exp(correction / temperature), normalised."""
        conditionals = []
        for head in range(1, len(self.ids)):
            scores = self.log_probs[head] + pairwise(head + 1, self.ids[head - 1], self.ids[head]) / temperature  # (k, k)
            scores -= scores.max(-1, keepdims=True)
            conditionals.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
        return HeadCandidates(self.ids, self.probs, tuple(conditionals))

    @classmethod
    def top(cls, logits: Tensor, top_k: int, temperature: float) -> "HeadCandidates":
        """Top-k of softmax(logits / temperature), logits (n, V), renormalised over the k (method.md section 6.1).

        Raises InputError for more candidates than tokens and for logits without a finite largest value.
        """
        vocab_size = logits.shape[-1]
        if top_k > vocab_size:
            raise InputError(f"top_k is {top_k}, but the vocabulary has {vocab_size} tokens; choose a smaller top_k.")
        ids, scores = highest(logits.detach(), top_k)
        return cls.ranked(ids.cpu().numpy(), scores.cpu().double().numpy(), temperature)

    @classmethod
    def ranked(cls, ids: np.ndarray, scores: np.ndarray, temperature: float) -> "HeadCandidates":
        """`top` of the candidates and their logits, (n, k) each, as `highest` orders them."""
        if not np.isfinite(scores[:, 0]).all():
            raise InputError("The largest logit of a head is not a finite number; check the model's output.")
        probs = np.exp((scores - scores[:, :1]) / temperature)
        return cls(ids, probs / probs.sum(-1, keepdims=True))

    def of(self, start: int, end: int) -> "HeadCandidates":
        """The heads start .. end - 1; `top` may have found those of several rows at once."""
        return HeadCandidates(self.ids[start:end], self.probs[start:end])

    @cached_property
    def log_probs(self) -> np.ndarray:
        """(n, k) float64; -inf for candidates without probability."""
        with np.errstate(divide="ignore"):
            return np.log(self.probs)


def highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the largest logits, (..., V) -> (..., count): falling, equal ones by increasing id.

    torch.topk takes any of equal ones, in any order, which the host puts right where it matters. A device that it would have
    to wait for sorts whole numbers instead, no two alike: a logit's bits as an integer, turned round where it is negative,
    rise with it, and the id comes after them. So logits that differ after their first 32 bits are equal there.
    """
    if logits.device.type in HOSTS:
        logits = logits.cpu().contiguous()
        fast = loader.sampler_of(logits)
        return (_compiled(fast, logits, count) if fast is not None else None) or _put_right(logits, count)
    vocab_size = logits.shape[-1]
    numbers = logits.float().nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0  # -0 and 0 are equal
    bits = numbers.view(torch.int32)
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    ids = vocab_size - 1 - ((ranks * 2**32 + places).topk(count).values & 0xFFFFFFFF)
    return ids, logits.gather(-1, ids)


def _compiled(fast: Any, logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """`highest` of float32 on the CPU by the kernels; None where a value is not a number."""
    shape, size = (*logits.shape[:-1], count), logits.shape[-1]
    ids, scores = torch.empty(shape, dtype=torch.long), torch.empty(shape, dtype=torch.float64)
    lines = logits.numel() // size
    strange = fast.dynamo_lm_highest(logits.data_ptr(), lines, size, count, ids.data_ptr(), scores.data_ptr())
    return None if strange else (ids, scores)


def _put_right(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`highest` of logits on the CPU; the values as float64."""
    best = torch.topk(logits, min(count + 1, logits.shape[-1]))  # one more shows where equal values straddle the cut
    ids, scores = best.indices.numpy(), best.values.double().numpy()
    tied = scores[..., :-1] == scores[..., 1:]
    if tied.any():
        tied &= np.isfinite(scores[..., :1])
        for line in zip(*np.nonzero(tied[..., count - 1 :].any(-1)), strict=True):
            last = scores[line][count - 1]
            places = np.flatnonzero(scores[line][:count] == last)
            ids[line][places] = (logits[line] == last).nonzero()[: len(places), 0].numpy()
        # Behind each other in memory: how many different values are larger, and the id. Equal values stay where they are.
        runs = np.zeros((*scores.shape[:-1], count), np.int64)
        np.cumsum(~tied[..., : count - 1], axis=-1, out=runs[..., 1:])
        keys = (runs << 32) | ids[..., :count]
        keys.sort(-1)
        ids[..., :count] = keys & 0xFFFFFFFF
    return best.indices.narrow(-1, 0, count), torch.from_numpy(scores).narrow(-1, 0, count)


def pairwise_correction(tokens: Tensor, rows: Tensor, gates: Tensor) -> PairwiseCorrection:
    """The coupling at one position, on the CPU, for the candidates whose `low_rank_factors` are given.

    Args:
        tokens: E, (vocabulary, rank).
        rows, gates: of heads 2.., (heads, k, rank) and (heads, rank).
    """
    rows, gates = rows.float(), gates.float()

    def correction(head: int, previous: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        given = tokens[torch.from_numpy(previous)].float() * gates[head - 2]
        return (given @ rows[head - 2].mT).double().numpy()

    return correction
