"""DynaMo: language models that predict several tokens per forward pass.

Importing this package imports neither torch nor transformers. The first use of a name below does, and registers DynaMo
models with transformers' `AutoConfig` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_lm.cooccurrence.table import Cooccurrence as Cooccurrence
    from dynamo_lm.errors import InputError as InputError
    from dynamo_lm.model.configuration import DynaMoConfig as DynaMoConfig
    from dynamo_lm.model.modeling import DynaMoForCausalLM as DynaMoForCausalLM
    from dynamo_lm.model.presets import PRESETS as PRESETS

__all__ = ["PRESETS", "Cooccurrence", "DynaMoConfig", "DynaMoForCausalLM", "InputError"]
__version__ = "0.1.0"

_MODULES = {
    "Cooccurrence": "dynamo_lm.cooccurrence.table",
    "InputError": "dynamo_lm.errors",
    "DynaMoConfig": "dynamo_lm.model.modeling",  # not its own module: the model is registered there
    "DynaMoForCausalLM": "dynamo_lm.model.modeling",
    "PRESETS": "dynamo_lm.model.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
