"""Parallel heads as a draft model of vLLM (checked with 0.32.0 on a CPU), in the place of an EAGLE-3 head.

In: the stem's states of verified positions, which vLLM captures as a draft's features, and the token after each. Out: a
state for the base's output embedding, and a packed state that vLLM hands back at the next drafting step. An EAGLE-3 head
drafts in steps that read each other's states; parallel heads have drafted all when the first step ends. So that step runs
all heads, each on keys and values of its own, gives out the state of head 2 and packs those of heads 3..n; each later step
unpacks the next one. The token drafted last arrives with every step: the learned coupling reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from dynamo_lm.model.coupling import Coupling

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class _Heads(nn.Module):
    """The layers of heads 2..n, the base's final norm, the coupling; vLLM puts the base's embedding in."""

    def __init__(self, config: Any, base_layers: int):
        super().__init__()
        own = copy.copy(config)
        own.hidden_size = size = config.stem_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, prefix="model.embed_tokens")
        current = get_current_vllm_config()
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(current, prefix=f"model.layers.{base_layers + place}", config=own)
            for place in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.coupling: Coupling | None = None
        if config.coupling_rank:
            like = torch.empty(1, 1).expand(config.vocab_size, size)
            self.coupling = Coupling(config.num_hidden_layers + 1, config.coupling_rank, like).requires_grad_(False)


class ParallelHeads(Eagle3LlamaForCausalLM):
    """What vLLM calls, step by step.

    Raises:
        ValueError: more drafts a step than there are heads, or vLLM would record the steps as a graph.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        nn.Module.__init__(self)
        drafting = vllm_config.speculative_config
        self.config = config = drafting.draft_model_config.hf_config
        heads = config.num_hidden_layers
        if drafting.num_speculative_tokens > heads:
            raise ValueError(f"num_speculative_tokens is {drafting.num_speculative_tokens}, and these heads draft {heads}")
        if not vllm_config.model_config.enforce_eager:
            raise ValueError("Parallel heads tell drafting steps apart, which a recorded graph cannot: give --enforce-eager")
        config.target_layer_count = base_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.model = _Heads(config, base_layers)
        self.lm_head = ParallelLMHead(config.vocab_size, config.stem_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.draft_id_to_target_id = None
        self.use_parallel_drafting = False
        self.step = 0

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """The features, (tokens, hidden), as wide as a packed state; vLLM calls it before the first step alone."""
        self.step = 0
        return nn.functional.pad(hidden_states, (0, self.config.hidden_size - hidden_states.shape[1]))

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One drafting step.

        Args:
            input_ids: the token before the drafted one, (tokens,).
            positions: of the features, (tokens,).
            hidden_states: the features, in later steps the packed states, (tokens, packed).

        Returns:
            The state to read the draft from, (tokens, hidden), and the packed states of the heads that follow.
        """
        model, size = self.model, self.config.stem_size
        if get_forward_context().attn_metadata is None:  # vLLM measures memory
            self.step = 0
        if self.step == 0:
            stem = hidden_states[:, :size].contiguous()
            own, *rest = (model.norm(*layer(positions, stem.clone(), None))[0] for layer in model.layers)
            packed = torch.cat(rest, -1) if rest else hidden_states
        else:
            own, packed = hidden_states[:, :size].contiguous(), hidden_states.roll(-size, -1)
        if model.coupling is not None:
            head = 2 + min(self.step, len(model.layers) - 1)
            own = own + model.coupling.hidden_correction(head, own, input_ids.long())
        self.step += 1
        return own, packed

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fills the heads.

        Raises:
            ValueError: a tensor is missing.
        """
        mapper = WeightsMapper(orig_to_new_prefix={"": "model."}, orig_to_new_stacked=STACKED)
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        wanted = {name for name, _ in self.named_parameters() if name.startswith("model.") and "embed_tokens" not in name}
        if missing := sorted(wanted - loaded):
            raise ValueError(f"The folder of the heads has no {missing[0]}")
