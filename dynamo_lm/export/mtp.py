"""A folder with a base, its head and their code, which transformers opens and drafts with: `generate(use_mtp=True)`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from dynamo_lm.backbone import eagle3_layer
from dynamo_lm.export import eagle3_generation
from dynamo_lm.export.forms import eagle3_config, tensors
from dynamo_lm.model.modeling import DynaMoForCausalLM

MODELING = "modeling_eagle3"
CODE = '''"""{kind} with a head of the EAGLE-3 form, which drafts in `generate(use_mtp=True)`."""

from transformers import {config}, {kind}

from .eagle3_generation import WithEagle3


class Eagle3Config({config}):
    pass


class Eagle3ForCausalLM(WithEagle3, {kind}):
    config_class = Eagle3Config
'''


def write(model: DynaMoForCausalLM, folder: Path, tokenizer: Any) -> None:
    """Fills `folder`. Without trust_remote_code it opens as the base."""
    base, head = model.base, tensors(model, "midlayer")
    head.pop("t2d", None)
    weights = {name: tensor.detach().cpu() for name, tensor in base.state_dict().items()}
    weights |= {f"eagle3.{name.replace('lm_head', 'draft_output')}": tensor for name, tensor in head.items()}
    base.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = eagle3_config(model)
    config |= {key: stated[key] for key in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")}
    config |= {"num_draft_tokens": model.num_heads - 1, "architectures": ["Eagle3ForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": f"{MODELING}.Eagle3Config",
        "AutoModelForCausalLM": f"{MODELING}.Eagle3ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = CODE.format(kind=type(base).__name__, config=type(base.config).__name__)
    (folder / f"{MODELING}.py").write_text(code, encoding="utf-8")
    for module in (eagle3_layer, eagle3_generation):
        name = module.__name__.rpartition(".")[2]
        text = inspect.getsource(module).replace("from dynamo_lm.backbone.eagle3_layer", "from .eagle3_layer")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
