"""LoRA on the trunk through peft: the base learns low-rank changes, and becomes a plain model again at the end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from dynamo_lm.errors import InputError, first_line
from dynamo_lm.model.modeling import DynaMoForCausalLM


class TrunkLora:
    """Low-rank changes of every linear layer of `model.base` except its output embedding; the base itself is frozen.

    The extra heads are left alone: they train in full. What is added are parameters of `model.base` named `lora_*`, so that
    optimizer and checkpoints need to know nothing of it.

    Source: LoRA, arXiv 2106.09685; alpha is twice the rank.
    """

    def __init__(self, model: DynaMoForCausalLM, rank: int):
        """Adds the changes, which are nothing at first.

        Raises:
            InputError: a rank below 1, heads that share the base's weights, or a base that peft cannot change.
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        if rank < 1:
            raise InputError(f"--lora-rank is {rank}; give 1 or more.")
        if model.config.adapter_rank:
            raise InputError(
                "Heads that are adapters share the base's last layer, which --lora-rank would change under them."
            )
        self._base = model.base
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
        try:
            self._lora: Any = LoraModel(model.base, config, "trunk")
        except ValueError as error:
            raise InputError(f"peft cannot change this base: {first_line(error)}") from error

    def merge(self) -> None:
        """Adds the changes to the base's weights and takes everything else away."""
        self._lora.merge_and_unload()
        with suppress(AttributeError):
            del self._base.peft_config
        self._base.requires_grad_(True)
