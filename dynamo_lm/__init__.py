"""DynaMo: language models that predict several tokens per forward pass."""

from transformers import AutoConfig, AutoModelForCausalLM

from dynamo_lm.config import PRESETS, DynaMoConfig
from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.model import DynaMoForCausalLM

__all__ = ["PRESETS", "Cooccurrence", "DynaMoConfig", "DynaMoForCausalLM", "InputError"]
__version__ = "0.1.0"

AutoConfig.register(DynaMoConfig.model_type, DynaMoConfig)
AutoModelForCausalLM.register(DynaMoConfig, DynaMoForCausalLM)
