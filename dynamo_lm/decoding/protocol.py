"""What the decoding loop needs of a model: several heads on one base, and nothing of how they were made.

`dynamo_lm.model.modeling.DynaMoForCausalLM` satisfies it. The decoding package annotates with this protocol, so it never
imports the class.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.decoding.runtime import Runtime


class MultiHeadLM(Protocol):
    """A causal language model whose head i predicts the token i positions ahead.

    Attributes:
        base: the Hugging Face model that head 1 is.
        coupling: `dynamo_lm.model.coupling.Coupling`, or None.
        cooccurrence: n-gram tables, or None.
        plain_readout: whether logits are the output embedding's product and nothing else.
        stack_heads: whether the heads' layers may run as one with the last layer.
    """

    base: PreTrainedModel
    config: Any
    generation_config: Any
    coupling: Any
    cooccurrence: Cooccurrence | None
    plain_readout: bool
    stack_heads: bool
    runtime: Runtime

    @property
    def num_heads(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def last_layer(self) -> nn.Module: ...

    @property
    def cache_entries(self) -> int: ...

    @property
    def sequential_head(self) -> Any:
        """The one head whose steps are heads 2.., of a model whose configuration is `sequential`."""

    def get_input_embeddings(self) -> nn.Module: ...

    def hidden(self, input_ids: Tensor, *, num_heads: int | None = None, **kwargs: Any) -> Tensor:
        """Final hidden states of heads 1..num_heads, (num_heads, batch, length, hidden)."""

    def readout(self, hidden: Tensor, head: int = 1) -> Tensor:
        """Logits of one head, (batch, length, hidden) -> (batch, length, vocabulary)."""

    def output_weight(self, head: int = 1) -> Tensor:
        """The output embedding of one head, (vocabulary, hidden)."""

    def optimize_for_inference(self, num_heads: int, *, fuse: bool = True) -> MultiHeadLM:
        """The same tensors, arranged for steps of a few tokens."""

    def modules(self) -> Any: ...

    def parameters(self) -> Any: ...

    def buffers(self) -> Any: ...
