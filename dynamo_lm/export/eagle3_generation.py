"""A head of the EAGLE-3 form inside transformers' assisted generation, `generate(use_mtp=True)`.

In: a causal language model of transformers with a head beside it. Out: candidates for its own verification, batch size 1.
`dynamo-lm export --to mtp` writes a copy of this file beside the weights. transformers' own MTP layers read the base's last
state alone, and this head reads those of three layers, so the class brings a candidate generator of its own; the two names
that it overrides are not documented, and were checked on transformers 5.16.0, 5.23.0 and 5.24.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.candidate_generator import CandidateGenerator

from dynamo_lm.backbone.eagle3_layer import DraftCache, Eagle3Layer, norm_of


class Eagle3(nn.Module):
    """The head, with the names of its weights; `d2t[k]` is the id of the k-th token of a draft vocabulary, less k."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        size, drafts = config.hidden_size, config.draft_vocab_size
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = Eagle3Layer(config, {})
        self.norm = norm_of(config, {})
        if drafts:
            self.draft_output = nn.Linear(size, drafts, bias=False)
            self.register_buffer("d2t", torch.zeros(drafts, dtype=torch.long))


class Eagle3Candidates(CandidateGenerator):
    """Drafts `config.num_draft_tokens` tokens behind the ones that the base has read."""

    requires_model_outputs = True

    def __init__(self, model: Any, generation_config: Any, logits_processor: Any):
        self.model_kwargs_overrides = {"output_hidden_states": True}
        self.model, self.options, self.processor = model, generation_config, logits_processor
        self.cache = DraftCache()

    def update_candidate_strategy(self, *_: Any) -> None:
        """The number of drafts stays as it is; transformers 5.16 wants this method."""

    def get_candidates(  # type: ignore[override]  # transformers itself hands these arguments over by name
        self, input_ids: Tensor, model_outputs: Any = None, is_first_iteration: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """input_ids: (1, tokens), all of them verified; the last one has not been read by the base."""
        model, new = self.model, input_ids.shape[1] - 1 - self.cache.length
        count = min(model.config.num_draft_tokens, self.options.max_length - input_ids.shape[1] - 1)
        if is_first_iteration or count < 1:
            return input_ids, None
        states = [model_outputs.hidden_states[layer] for layer in model.config.eagle_aux_hidden_state_layer_ids]
        if states[0].shape[1] < new:  # generation began with a cache: the features of its positions are unknown
            return input_ids, None
        head, embed = model.eagle3, model.get_input_embeddings()
        state = head.fc(torch.cat(states, -1)[:, :new])
        state = head.midlayer.advance(state, embed(input_ids[:, -new:]), self.cache)[:, -1:]
        verified, found = self.cache.length, []
        while True:
            logits = self.processor(input_ids, self._logits(state))
            found.append(logits)
            token = torch.multinomial(logits.softmax(-1), 1) if self.options.do_sample else logits.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], -1)
            if len(found) == count:
                break
            state = head.midlayer.advance(state, embed(token), self.cache)
        self.cache.length = verified
        return input_ids, torch.stack(found, 1)

    def _logits(self, state: Tensor) -> Tensor:
        """(1, 1, hidden) -> (1, vocabulary); a token that is not in the draft vocabulary has no chance."""
        model, head = self.model, self.model.eagle3
        normed = head.norm(state)[:, 0]
        if not model.config.draft_vocab_size:
            return model.get_output_embeddings()(normed).float()
        drafts = head.draft_output(normed).float()
        ids = head.d2t + torch.arange(len(head.d2t), device=drafts.device)
        return drafts.new_full((1, model.config.vocab_size), -torch.inf).index_copy(-1, ids, drafts)


class WithEagle3:
    """Adds the head to a class of transformers that stands behind it in the list of bases."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.eagle3 = Eagle3(config)

    def _get_candidate_generator(
        self, *, generation_config: Any, logits_processor: Any, **others: Any
    ) -> CandidateGenerator:
        if generation_config.use_mtp:
            return Eagle3Candidates(self, generation_config, logits_processor)
        original: Any = super()
        return original._get_candidate_generator(
            generation_config=generation_config, logits_processor=logits_processor, **others
        )
