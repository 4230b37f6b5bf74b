"""Attention of training-time test: queries of a chain's later step, over a text and over the chain's own earlier steps.

The keys of a chain's own steps differ from query to query, which fused attention cannot take. It runs over the text alone
and returns the sum of the weights beside the mixed values, so that the chain's own columns join under one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16  # head sizes that fused attention reads in whole vectors


def chain_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], visible: Tensor, scale: float) -> Tensor:
    """What every query mixes.

    A key of zeros is added to the text. Its score is 0, so its weight in a softmax over the text is 1 over the sum of
    exponents, up to the weight of the text. Two columns of the values count both weights.

    Args:
        q: (batch, kv heads, group, length, size).
        keys, values: by step, (batch, kv heads, length, size): of the first step those of the text, of later ones the
            query's own.
        visible: which positions of the text each position sees, (batch or 1, 1, length, length) bool; at least one.

    Returns:
        (batch, kv heads, group, length, size).
    """
    batch, kv_heads, group, _, size = q.shape
    text_key, text_value = (x.repeat_interleave(group, 1) for x in (keys[0], values[0]))
    if len(keys) == 1:
        mixed = F.scaled_dot_product_attention(q.flatten(1, 2), text_key, text_value, attn_mask=visible, scale=scale)
        return mixed.unflatten(1, (kv_heads, group))
    room = -(size + 2) % MULTIPLE + 2
    marks = text_value.new_zeros(2, room)
    marks[0, 0], marks[1, 1] = 1, 1  # of the text, and of the key of zeros
    text = torch.cat([text_value, marks[0].expand(*text_value.shape[:-1], room)], -1)
    zero = torch.cat([text.new_zeros(size), marks[1]]).expand(batch, kv_heads * group, 1, size + room)
    mixed = F.scaled_dot_product_attention(
        F.pad(q.flatten(1, 2), (0, room)),
        F.pad(text_key, (0, room, 0, 1)),
        torch.cat([text, zero], 2),
        attn_mask=F.pad(visible, (0, 1), value=True),
        scale=scale,
    )
    mixed = mixed.unflatten(1, (kv_heads, group)).float()
    # With s the sum of exponents over the text: `mixed` is (sum of exponents x values) / (1 + s), `own` exponents / (1 + s).
    scores = torch.stack([(q * key[:, :, None]).sum(-1) for key in keys[1:]], -1).float() * scale
    own = (scores + mixed[..., size + 1, None].log()).exp()  # (batch, kv heads, group, length, steps - 1)
    total = mixed[..., size, None] + own.sum(-1, keepdim=True)
    result = mixed[..., :size]
    for place, value in enumerate(values[1:]):
        result = result + own[..., place, None] * value[:, :, None]
    return (result / total).to(q.dtype)
