"""A DynaMo model: any Hugging Face decoder, and n-1 extra heads beside its last layer (method.md section 1).

In: token ids. Out: final hidden states of heads 1..n, and logits read from them. The base is never modified: during a
call that asks for the heads, a hook on the base's last decoder layer hands its inputs (hidden state, mask, rotary tables,
cache) to the heads and stacks their outputs along the batch, so the base's own final norm applies to all of them; the
base's own readout (output embedding, soft-caps, scales) then turns any of them into logits. Nothing here knows an
architecture, a tokenizer, or how tokens are chosen.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynamo_lm.backbone import offloading
from dynamo_lm.backbone.base_model import (
    PassThrough,
    body_name,
    captured_inputs,
    check_base,
    decoder_layers,
    fingerprint,
    layer_input,
    load_base,
)
from dynamo_lm.backbone.feature_layers import read_layers
from dynamo_lm.backbone.stacked_heads import StackedHeads
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.decoding.generate import ended, generate
from dynamo_lm.decoding.runtime import Runtime
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.quantized import is_quantized
from dynamo_lm.model.base_check import check_contract
from dynamo_lm.model.checkpoint import load, save
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.coupling import Coupling
from dynamo_lm.model.eagle3 import Eagle3Head, sequential_states
from dynamo_lm.model.heads import ScaleGradient, TokenHead
from dynamo_lm.model.optimized import optimized
from dynamo_lm.model.resizing import check_new_size, resize_heads
from dynamo_lm.private_interfaces import cache_argument


class DynaMoForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model with n token heads; head i predicts the token i positions ahead.

    `forward` is the base's own, bit for bit. `hidden` and `readout` give the other heads; `generate` decodes several tokens
    per step (see `dynamo_lm.decoding.batch`).

    Attributes:
        base: the Hugging Face causal language model, untouched.
        heads: the extra heads, `heads[0]` is head 2; of the kind eagle3 one head, whose steps are heads 2, 3, ..
        coupling: the learned coupling of the heads (`dynamo_lm.model.coupling`), or None.
        cooccurrence: n-gram tables for the mask (method.md section 3), or None.
    """

    config_class = DynaMoConfig
    config: DynaMoConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    input_modalities = "text"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DynaMoConfig, base: PreTrainedModel | None = None):
        if config.base_config is None:
            raise InputError("This DynaMo configuration names no base model; build it with DynaMoForCausalLM.from_base.")
        super().__init__(config)
        self.base = base if base is not None else AutoModelForCausalLM.from_config(config.base_config)
        config.base_config = self.base.config
        check_base(self.base)
        if config.sequential and offloading.is_hooked(self.base):
            raise InputError("An eagle3 head needs a base that is whole on one device; open it without device_map.")
        self._last_layer = (decoder_layers(self.base)[-1],)  # in a tuple, so that it is not registered a second time
        rank = config.coupling_rank
        with offloading.loaded(self.last_layer), offloading.loaded(self.base.get_output_embeddings()):
            self.heads = nn.ModuleList(
                [Eagle3Head(self.base, init=config.init, draft_vocab_size=config.draft_vocab_size)]
                if config.sequential
                else (TokenHead(config, self.base, self.last_layer, index) for index in range(config.num_heads - 1))
            )
            self.coupling = Coupling(config.num_heads, rank, self.output_weight()) if rank else None
        self.cooccurrence: Cooccurrence | None = None
        self.plain_readout = False  # known of a model that was arranged for decoding
        self.stack_heads = True  # see optimize_for_inference; False where `base_check` found that it changes the results
        self.cache_argument = cache_argument(self.body)
        self.runtime = Runtime()
        self.generation_config = copy.deepcopy(self.base.generation_config)
        self.generation_config._from_model_config = False  # else transformers drops settings of our own, like eps_b
        mine = {id(parameter): f"base.{name}" for name, parameter in self.base.named_parameters()}
        self._tied_weights_keys = {  # what adapters share
            f"heads.{name}": mine[id(parameter)]
            for name, parameter in self.heads.named_parameters(remove_duplicate=False)
            if id(parameter) in mine
        }
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.base._init_weights(module)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """{name of a shared tensor: name it is saved under}: the base's own ties, and what adapters share with it."""
        ties = super().get_expanded_tied_weights_keys(all_submodels)
        return ties if all_submodels else ties | (self._tied_weights_keys or {})

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    # ------------------------------------------------------------------ parts of the base

    @property
    def body(self) -> nn.Module:
        """The base without its output embedding: embedding, decoder layers, final norm."""
        return getattr(self.base, body_name(self.base))

    @property
    def last_layer(self) -> nn.Module:
        """The base's last decoder layer, which is head 1's (method.md section 1)."""
        return self._last_layer[0]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return offloading.execution_device(self.base) or super().device

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def sequential_head(self) -> Eagle3Head:
        """The one head of a model of the kind eagle3."""
        return cast(Eagle3Head, self.heads[0])

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Resizes the vocabulary of the base, as its own `resize_token_embeddings` does, and of the heads.

        A new token is read by heads with an output embedding of their own as the base reads it.

        Raises:
            InputError: the tables or a draft vocabulary have tokens beyond the new size, or the weights are rounded.
        """
        if is_quantized(self):
            raise InputError("The weights have 8 or 4 bits and cannot be resized; resize the model before they are rounded.")
        if new_num_tokens is not None:
            check_new_size(self, new_num_tokens)
        embeddings = self.base.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        resize_heads(self)
        return embeddings

    def output_weight(self, head: int = 1) -> Tensor:
        """The output embedding that head 1..n reads its logits with, (vocabulary or draft vocabulary, hidden)."""
        own = head > 1 and self.config.own_output_embedding
        if own and self.config.sequential:
            return self.sequential_head.lm_head.weight
        output: Any = self.heads[head - 2].output if own else self.base.get_output_embeddings()
        return output.weight

    def freeze_base(self) -> DynaMoForCausalLM:
        """Stops all gradients into the base (variant "-H", method.md section 7) and returns self."""
        self.base.requires_grad_(False)
        return self

    def overhead(self) -> float:
        """Parameters of the extra heads and their coupling over the base's (method.md section 1, table)."""
        base = {id(p): p.numel() for p in self.base.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in base) / sum(base.values())

    # ------------------------------------------------------------------ forward

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """The base model's forward, unchanged: logits of head 1, (batch, length, vocabulary)."""
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        num_heads: int | None = None,
        gradient_scale: float = 1.0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final (normed) hidden states of heads 1..num_heads at every position.

        Args:
            input_ids: token ids, (batch, length).
            num_heads: how many heads to compute, all by default; 1 is the base alone.
            gradient_scale: factor on the gradient that heads 2..n send into the base, `LR_MB / LR_B` (method.md section
                6.6). Their losses must have been multiplied by the same factor (see `dynamo_lm.training.step`), which the
                heads' own layers undo.
            cache: the KV cache, if any.
            **kwargs: what the base's body takes: attention_mask, position_ids, use_cache.

        Returns:
            (num_heads, batch, length, hidden), in the base's dtype.
        """
        n = self.num_heads if num_heads is None else num_heads
        if not 1 <= n <= self.num_heads:
            raise InputError(
                f"{n} heads were requested of a model that has {self.num_heads}; ask for 1 to {self.num_heads}."
            )
        kwargs.setdefault("use_cache", cache is not None)
        kwargs[self.cache_argument] = cache
        if n == 1 or isinstance(self.last_layer, StackedHeads):
            return self.body(input_ids=input_ids, **kwargs).last_hidden_state.unflatten(0, (n, -1))
        if self.config.sequential:
            return self.sequential_hidden(*self.features_and_final(input_ids, **kwargs), input_ids, n, **kwargs)
        learning = torch.is_grad_enabled()
        frozen = learning and not any(p.requires_grad for p in self.base.parameters())

        def beside_last_layer(module: nn.Module, args: tuple, layer_kwargs: dict, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            feed = layer_input(args, layer_kwargs) if self.config.feed == "stem" else first
            if feed.device != first.device:  # accelerate moves what the layer takes after hooks have seen it
                feed, args, layer_kwargs = offloading.moved((feed, args, layer_kwargs), first.device)
            if learning:
                feed = feed.detach() if frozen else ScaleGradient.apply(feed, gradient_scale)
            states = [first]
            for head in self.heads[: n - 1]:
                state = head(feed, args, layer_kwargs)
                states.append(ScaleGradient.apply(state, 1 / gradient_scale) if learning and not frozen else state)
            stacked = torch.cat(states)  # (n * batch, length, hidden): the final norm sees one larger batch
            return (stacked, *output[1:]) if isinstance(output, tuple) else stacked

        with self.last_layer.register_forward_hook(beside_last_layer, with_kwargs=True):
            stacked = self.body(input_ids=input_ids, **kwargs).last_hidden_state
        return stacked.unflatten(0, (n, -1))

    def features_and_final(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a sequential head reads, (batch, length, 3 hidden), and head 1's final states, without gradient."""
        with torch.no_grad(), captured_inputs(read_layers(self.base)) as features:
            final = self.body(input_ids=input_ids, **kwargs).last_hidden_state
        return features[0], final

    def sequential_hidden(self, features: Tensor, final: Tensor, input_ids: Tensor, n: int, **kwargs: Any) -> Tensor:
        """`hidden` of a sequential head, whose drafts are the text's own tokens; the base gets no gradient."""
        how = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
        embedding = self.get_input_embeddings()
        steps = sequential_states(self.sequential_head, embedding, input_ids, features, n - 1, **how)
        return torch.stack([final, *(step.to(final.dtype) for step in steps)])

    def readout(self, hidden: Tensor, head: int = 1) -> Tensor:
        """Logits of one head from its final hidden states, through the base's own output path.

        Args:
            hidden: (batch, length, hidden) as `hidden` returns them.
            head: 1..n; differs from 1 only where heads have their own output embedding.

        Returns:
            (batch, length, vocabulary).
        """
        if head > 1 and self.config.sequential and self.config.own_output_embedding:
            drafts = self.sequential_head.lm_head(hidden)
            every = drafts.new_full((*drafts.shape[:-1], self.output_weight().shape[0]), -torch.inf)
            return every.index_copy(-1, self.sequential_head.draft_ids, drafts)
        if self.plain_readout and (head == 1 or not self.config.own_output_embedding):
            return self.base.get_output_embeddings()(hidden)
        # A shallow twin of the base whose body hands its input through: what remains of its forward is the readout, with
        # whatever soft-cap or scale the architecture applies.
        twin = copy.copy(self.base)
        offloading.forget_own_hook(twin)  # which would call the base's own body
        parts: dict[str, Any] = {**self.base._modules, body_name(self.base): PassThrough(self.body)}
        if head > 1 and self.config.own_output_embedding:
            output, own = self.base.get_output_embeddings(), cast(Any, self.heads[head - 2])
            name = next(name for name, module in self.base._modules.items() if module is output)
            parts[name], hidden = own.output, own.block(hidden)
        twin._modules = parts
        return twin(inputs_embeds=hidden, use_cache=False).logits

    def logits(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits of all heads at every position, (n, batch, length, vocabulary); for evaluation of short texts."""
        hidden = self.hidden(input_ids, **kwargs)
        return torch.stack([self.readout(state, head) for head, state in enumerate(hidden, start=1)])

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Continues prompts, several tokens per forward pass (method.md section 4).

        Takes what transformers' `generate` takes (GenerationConfig, attention_mask, stopping criteria, stop_strings with
        tokenizer, streamer, processors, do_sample, temperature, top_k, ...), and:

        Args:
            verify: "strict" (default: this loop's own one-token text, or the base's distribution), "off" (Algorithm 1), or a
                budget: the nats per token that the base model's log-likelihood may lose at temperature 1, whatever
                temperature is sampled at, 0 being "strict".
            num_heads: heads to use, the ceiling on tokens per step; all by default, 1 is the base model.
            eps_b, alpha_c, otsu, blur: Algorithm 1's switches; see `sampling.options.Algorithm1`. alpha_c shapes drafts
                that are verified, too: 0.6 by default, 0.3 with a sequential head, 0 for the heads alone.
                Under "off" top_k, temperature and repetition_penalty default to the paper's 50, 0.7 and 1.1;
                do_sample=False takes the likeliest tuple instead of drawing one.
            tree: greedy and verified: how many drafts a step verifies as a tree, 0 for a chain. By default what is fastest,
                as the first steps show, where that cannot change the text (in float32); elsewhere a chain. A sequential
                head drafts chains, by default as long as steps show that they pay, with 0 always.
            prompt_lookup_num_tokens: verified: draft from the text itself where its latest three tokens stood before, at
                most so many tokens; elsewhere heads draft. 0 by default. In a batch and with compile at most num_heads - 1.
            compile: one prompt only: compile the steps, which takes a minute the first time (and a C++ compiler on CPUs) and
                makes small models much faster.
            synthetic_acceptance: accept each draft by chance, with this probability, in place of verification: for tests,
                and to time what heads that are accepted so often would give; greedy chains; the text is worth nothing.
            seed: of the rows' random numbers: row r uses seed + r, or the r-th of a list; from torch's global state if None.
            on_step: called with (row, tokens) after every step.

        Returns:
            (rows, length) token ids; with return_dict_in_generate=True a `DynaMoOutput` with statistics by row.

        Raises:
            InputError: an option that the mode does not support, an empty or too long prompt.
        """
        with ended(kwargs.get("streamer")):
            return generate(self, inputs, *args, **kwargs)

    def optimize_for_inference(self, num_heads: int, *, fuse: bool = True) -> DynaMoForCausalLM:
        """The same model over the same tensors, arranged for steps of a few tokens with heads 1..num_heads.

        See `dynamo_lm.model.optimized`; its results are this model's, up to rounding.
        """
        return optimized(self, num_heads, fuse=fuse)

    @torch.no_grad()
    def reads_plainly(self) -> bool:
        """Whether the base's output path is its output embedding and nothing else, which one state shows."""
        weight, output = self.output_weight(), self.base.get_output_embeddings()
        device = offloading.device_of(output)
        state = torch.linspace(-4, 4, weight.shape[1], dtype=weight.dtype, device=device)[None, None]
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):  # it would convert the whole output embedding, twice
                return torch.equal(self.readout(state), output(state))
        return torch.equal(self.readout(state), output(state))

    @property
    def cache_entries(self) -> int:
        """Layers that a cache must have room for: the base's, and the heads' that are not part of a `StackedHeads`."""
        apart = (
            0
            if self.config.sequential or isinstance(self.last_layer, StackedHeads)
            else (self.num_heads - 1) * self.config.layers_per_head
        )
        return len(decoder_layers(self.base)) + apart

    # ------------------------------------------------------------------ construction and files

    @classmethod
    def from_base(
        cls,
        base: str | PreTrainedModel,
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
        **kwargs: Any,
    ) -> DynaMoForCausalLM:
        """Adds heads 2..num_heads to a causal language model (method.md sections 1 and 7).

        Args:
            base: a hub id, a local folder, or a loaded transformers model.
            num_heads: n, head 1 included.
            head, draft_vocab_size, layers_per_head, feed, init, own_output_embedding, adapter_rank, residual_block,
                coupling_rank: see `DynaMoConfig`; `**dynamo_lm.model.configuration.MEDUSA` gives heads of the Medusa kind.
            **kwargs: handed to `AutoModelForCausalLM.from_pretrained` when `base` is a name (dtype, revision, ...).

        Raises:
            InputError: the base cannot be loaded, is not a decoder-only language model, or its code ignores what it is
                handed (see `dynamo_lm.model.base_check`).
        """
        name = base if isinstance(base, str) else (base.config._name_or_path or None)
        loaded = load_base(base, **kwargs) if isinstance(base, str) else base
        check_base(loaded)
        stack_heads = check_contract(loaded, cls)
        config = DynaMoConfig(
            loaded.config,
            num_heads,
            head=head,
            draft_vocab_size=draft_vocab_size,
            layers_per_head=layers_per_head,
            feed=feed,
            init=init,
            own_output_embedding=own_output_embedding or draft_vocab_size > 0,
            adapter_rank=adapter_rank,
            residual_block=residual_block,
            coupling_rank=coupling_rank,
            base_name_or_path=name,
            base_fingerprint=fingerprint(loaded),
            dtype=loaded.dtype,
        )
        model = cls(config, loaded)
        model.stack_heads = stack_heads
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> DynaMoForCausalLM:
        """Opens a folder or hub repository written by `save_pretrained`, full or heads-only.

        Args:
            base: for a heads-only folder, the base to use (name or loaded model) instead of the recorded one.
            allow_base_mismatch: take a base of the same shape whose weights differ from those that the heads were trained
                for, such as another quantisation of it; with a warning.
            **kwargs: as in transformers.

        Raises:
            InputError: no such model, damaged files, or heads that belong to another base.
        """
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str, weights: str = "full", **kwargs: Any
    ) -> None:
        """Writes a folder that `from_pretrained` opens; see `dynamo_lm.model.checkpoint.save`."""
        save(self, save_directory, weights, **kwargs)


AutoConfig.register(DynaMoConfig.model_type, DynaMoConfig)
AutoModelForCausalLM.register(DynaMoConfig, DynaMoForCausalLM)
