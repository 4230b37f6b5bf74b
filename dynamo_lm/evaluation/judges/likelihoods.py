"""Log-probabilities of chosen tokens of texts, and final hidden states, under a language model, batch by batch.

Knows token ids only. Logits exist for the scored positions alone and a chunk at a time: with Gemma's vocabulary those of a
whole batch would be gigabytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamo_lm.backbone.base_model import PassThrough
from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.linear import optimize_modules

CHUNK = 256  # positions whose logits exist at once: 268 MB at a vocabulary of 262,144


@dataclass(frozen=True)
class Text:
    """Token ids, and which of them are scored."""

    ids: list[int]
    scored: list[int]  # places in ids, rising, each with a token before it


class Reader:
    """A causal language model that reads texts in batches and computes logits at the scored positions only."""

    def __init__(self, model: Any, name: str):
        """Takes `model` apart; where body and readout are not what its own forward computes, that is used as a whole.

        Raises:
            InputError: its logits at a token depend on later tokens, so they give no likelihoods.
        """
        self._model = model
        config = model.config.get_text_config()
        self.context = context_limit(config)
        self._body: Any = getattr(model, model.base_model_prefix, None)
        output = model.get_output_embeddings()
        self._readout: Any = None  # a twin of the model whose body hands hidden states through
        ids = torch.arange(min(8, self.context), device=model.device)[None] % config.vocab_size  # (1, 8)
        with torch.inference_mode():
            whole = model(ids, use_cache=False, output_hidden_states=True)
            self.width = whole.hidden_states[-1].shape[-1]
            if not _alike(model(ids[:, :-1], use_cache=False).logits, whole.logits[:, :-1]):
                raise InputError(f'The judge "{name}" looks at later words: it is not a causal language model; use another.')
            names = [key for key, module in model._modules.items() if module is output and output is not None]
            if not names or self._body is None or self._body is model:
                return
            twin = copy.copy(model)
            parts: dict[str, nn.Module] = {
                model.base_model_prefix: PassThrough(self._body),
                names[0]: optimize_modules(output),
            }
            twin._modules = {**model._modules, **parts}
            hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
            mine = twin(inputs_embeds=hidden, use_cache=False).logits
            if _alike(mine, whole.logits):
                self._readout, self.width = twin, hidden.shape[-1]

    @torch.inference_mode()
    def read(self, texts: Sequence[Text]) -> Iterator[tuple[float, np.ndarray]]:
        """The sum of each text's log-probabilities of its scored tokens, and the mean final state over them, of norm 1."""
        if self._readout is None and len(texts) > 1:  # logits come at every position: one text at a time
            for text in texts:
                yield from self.read([text])
            return
        longest = max(len(text.ids) for text in texts)
        # Padding on the right follows everything that is read, so a causal model needs no mask for it.
        padded = [text.ids + [text.ids[-1]] * (longest - len(text.ids)) for text in texts]
        ids = torch.tensor(padded, device=self._model.device)  # (texts, longest)
        hidden, logits = self._forward(ids)
        rows = torch.tensor([row for row, text in enumerate(texts) for _ in text.scored], device=ids.device)
        places = torch.tensor([place for text in texts for place in text.scored], device=ids.device)
        sums = torch.zeros(len(texts), dtype=torch.float64)
        for row, place in zip(rows.split(CHUNK), places.split(CHUNK), strict=True):
            if logits is None:
                chunk = self._readout(inputs_embeds=hidden[row, place - 1][None], use_cache=False).logits[0]
            else:
                chunk = logits[row, place - 1]  # (chunk, vocabulary)
            sums.index_add_(0, row.cpu(), _log_probability(chunk, ids[row, place]))
        for number, text in enumerate(texts):
            mean = hidden[number, text.scored].float().mean(0)
            yield float(sums[number]), (mean / mean.norm().clamp(min=1e-12)).cpu().numpy()

    def _forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Final states (texts, length, hidden), and the logits where they could not be left out."""
        if self._readout is not None:
            return self._body(input_ids=ids, use_cache=False).last_hidden_state, None
        whole = self._model(ids, use_cache=False, output_hidden_states=True)
        return whole.hidden_states[-1], whole.logits


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    """Equal up to the rounding of their precision."""
    limit = 1e-3 if theirs.dtype in (torch.float32, torch.float64) else 0.05
    return mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= limit * max(1.0, float(theirs.abs().max())))


def _log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """log p(token), (rows,) in float64 on the CPU; logits (rows, vocabulary)."""
    logits = logits.float()
    return (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)).double().cpu()
