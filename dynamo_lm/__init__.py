"""DynaMo: language models that predict several tokens per forward pass."""

from transformers import AutoConfig, AutoModelForCausalLM

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.model.presets import PRESETS

__all__ = ["PRESETS", "Cooccurrence", "DynaMoConfig", "DynaMoForCausalLM", "InputError"]
__version__ = "0.1.0"

AutoConfig.register(DynaMoConfig.model_type, DynaMoConfig)
AutoModelForCausalLM.register(DynaMoConfig, DynaMoForCausalLM)
