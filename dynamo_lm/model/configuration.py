"""What a DynaMo model is made of: the base's configuration, the number of token heads and how the extra heads are built.

Knows no tensors. The seven Pythia models of the paper are here as named presets.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from dynamo_lm.backbone.token_limits import stated_context
from dynamo_lm.errors import InputError


class DynaMoConfig(PreTrainedConfig):
    """Configuration of `DynaMoForCausalLM` (method.md sections 1 and 7).

    Args:
        base_config: configuration of the base model, an object or its dictionary.
        num_heads: token heads n, head 1 (the base's own last layer) included: 3 for the paper's T3.
        head: "parallel" (each extra head predicts from the text alone, the method) or "eagle3" (one sequential head whose
            n - 1 steps predict from each other, see `dynamo_lm.model.eagle3`).
        draft_vocab_size: tokens that an "eagle3" head can draft; 0 for all.
        layers_per_head: decoder layers of each extra head; 0 leaves only an own output embedding.
        feed: "stem" (the penultimate layer's output, the paper's choice) or "last" (the last layer's output).
        init: "random" (the paper's choice) or "copy" of the base's last layer.
        own_output_embedding: whether each extra head has an output embedding of its own, copied from the base's.
        adapter_rank: rank of a low-rank adapter on a shared last layer, in place of a new layer; 0 for none.
        residual_block: whether each extra head passes its final state through x + SiLU(W x + b) before its own output
            embedding; with `MEDUSA`'s other settings, the heads of Medusa (arXiv 2401.10774).
        coupling_rank: rank of the learned coupling between heads, see `dynamo_lm.model.coupling`; 0 for none.
        quantization: "int8" or "int4" if the weights are rounded to it, see `dynamo_lm.kernels.quantized`; None if not.
        weights: what a saved folder holds, "full" or "heads".
        base_name_or_path: what the base was opened by: a hub id, or a folder, which may be relative to the heads' own.
        base_hub_id: its hub id, if it has one.
        base_path: the absolute path of its folder when the heads were saved, of heads-only folders.
        base_fingerprint: identity of that base, see `dynamo_lm.backbone.base_model.fingerprint`.
    """

    model_type = "dynamo_lm"
    sub_configs: ClassVar = {"base_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_heads: int = 3,
        *,
        head: str = "parallel",
        draft_vocab_size: int = 0,
        layers_per_head: int = 1,
        feed: str = "stem",
        init: str = "random",
        own_output_embedding: bool = False,
        adapter_rank: int = 0,
        residual_block: bool = False,
        coupling_rank: int = 0,
        quantization: str | None = None,
        weights: str = "full",
        base_name_or_path: str | None = None,
        base_hub_id: str | None = None,
        base_path: str | None = None,
        base_fingerprint: str | None = None,
        **kwargs: Any,
    ):
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        # A copy: transformers writes attention choices through a configuration into its parts.
        base_config = copy.deepcopy(base_config)
        self.base_config = base_config
        self.num_heads = num_heads
        self.head = head
        self.draft_vocab_size = draft_vocab_size
        self.layers_per_head = layers_per_head
        self.feed = feed
        self.init = init
        self.own_output_embedding = own_output_embedding
        self.adapter_rank = adapter_rank
        self.residual_block = residual_block
        self.coupling_rank = coupling_rank
        self.quantization = quantization
        self.weights = weights
        self.base_name_or_path = base_name_or_path
        self.base_hub_id = base_hub_id
        self.base_path = base_path
        self.base_fingerprint = base_fingerprint
        kwargs.pop("tie_word_embeddings", None)  # the base ties its own
        super().__init__(tie_word_embeddings=False, **kwargs)  # type: ignore[call-arg]
        if base_config is not None:
            self._check()

    def _check(self) -> None:
        if not isinstance(self.num_heads, int) or self.num_heads < 1:
            raise InputError(f"num_heads is {self.num_heads}; it counts the base's own head too, so give 1 or more.")
        if self.head not in ("parallel", "eagle3"):
            raise InputError(f'head is "{self.head}"; give "parallel" or "eagle3".')
        if self.head == "eagle3":
            self._check_eagle3()
        elif self.draft_vocab_size:
            raise InputError('draft_vocab_size goes with head="eagle3".')
        if self.layers_per_head not in (0, 1, 2):
            raise InputError(f"layers_per_head is {self.layers_per_head}; give 1 or 2, or 0 with own_output_embedding.")
        if self.feed not in ("stem", "last"):
            raise InputError(f'feed is "{self.feed}"; give "stem" (penultimate layer) or "last".')
        if self.init not in ("random", "copy"):
            raise InputError(f'init is "{self.init}"; give "random" or "copy".')
        if self.adapter_rank < 0 or (self.adapter_rank and self.layers_per_head != 1):
            raise InputError("adapter_rank must be 0 or positive, and goes with layers_per_head=1.")
        if self.num_heads > 1 and self.layers_per_head == 0 and not self.own_output_embedding:
            raise InputError("A head with no layer needs own_output_embedding=True, or it would repeat head 1.")
        if self.residual_block and not self.own_output_embedding:
            raise InputError("residual_block goes with own_output_embedding=True, whose states it prepares.")
        if not isinstance(self.coupling_rank, int) or self.coupling_rank < 0:
            raise InputError(f"coupling_rank is {self.coupling_rank}; give a positive number, or 0 for no coupling.")
        if self.coupling_rank and self.num_heads == 1:
            raise InputError("coupling_rank joins heads, so it needs num_heads of 2 or more.")

    def _check_eagle3(self) -> None:
        alone = (self.layers_per_head, self.feed, self.adapter_rank, self.residual_block, self.coupling_rank)
        if alone != (1, "stem", 0, False, 0):
            raise InputError(
                "A head of the eagle3 kind is one layer of its own form; leave out layers_per_head, feed, adapter_rank, "
                "residual_block and coupling_rank."
            )
        if self.num_heads < 2:
            raise InputError('num_heads is 1; an "eagle3" head drafts num_heads - 1 tokens, so give 2 or more.')
        if not isinstance(self.draft_vocab_size, int) or self.draft_vocab_size < 0:
            raise InputError(f"draft_vocab_size is {self.draft_vocab_size}; give a number of tokens, or 0 for all.")
        if self.own_output_embedding != (self.draft_vocab_size > 0):
            raise InputError("An eagle3 head has an output embedding of its own just where it has a draft vocabulary.")

    @property
    def sequential(self) -> bool:
        """Whether the extra heads are steps of one head."""
        return self.head == "eagle3"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's text configuration: what generation asks for vocabulary size, layers and window."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config()

    @property
    def vocab_size(self) -> int:
        return self.base_config.get_text_config().vocab_size  # type: ignore[union-attr]

    @property
    def base_name(self) -> str | None:
        """The base's hub id or the name of its folder; None for a model of its own."""
        recorded = self.base_name_or_path
        if self.base_hub_id or not recorded:
            return self.base_hub_id
        return (
            recorded
            if self.base_path is None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", recorded)
            else (Path(self.base_path or recorded).name)
        )

    @property
    def max_context(self) -> int | None:
        """Longest sequence in tokens that the base has positions for, or None where it states none."""
        return stated_context(self)


# Heads of the Medusa kind: no decoder layer, no cache entry; a residual block on the last layer's normed state and an output
# embedding copied from the base's. With a frozen base they are Medusa-1.
MEDUSA: dict[str, Any] = {"layers_per_head": 0, "feed": "last", "own_output_embedding": True, "residual_block": True}
