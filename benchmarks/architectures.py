"""Which of transformers' decoder architectures carry heads: each is tried on a tiny random model of its own configuration.

    python -m benchmarks.architectures [--only llama,gpt2]

For every model type that transformers opens as a causal language model: heads are added (which checks the base's code, see
`dynamo_lm.model.base_check`), and three prompts of different lengths are continued strictly and greedily; the text must be
that of the base's own `generate`, before and after the model is saved and loaded. Writes results/architectures.json after
every one and docs/architectures.md at the end. A second run tries those that are missing in the file or named by `--only`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.backbone.tiny_base import sharpen, tiny_base, tiny_config
from dynamo_lm.errors import first_line
from dynamo_lm.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "architectures.json", ROOT / "docs" / "architectures.md"
LARGEST = 6e7  # parameters of a tiny model; configurations that stay larger are those of several models in one
TOKENS = 16  # of each continuation
_common = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_dense = _common | {"num_hidden_layers": 3, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1}
_latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
_routed = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_turns = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
_gemma = _dense | _turns | {"head_dim": 16}
_by_layer = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}
SMALL: dict[str, dict[str, Any]] = {  # configurations of types whose default one does not make sense with fewer layers
    "codegen": {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "deepseek_v2": _dense | _latent | _routed | {"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1},
    "dots1": _dense | _routed | {"num_key_value_heads": 4, "head_dim": 16, "layer_types": ["full_attention"] * 3},
    "gemma3n_text": _gemma
    | _by_layer
    | {"intermediate_size": [96] * 4, "num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _gemma | _by_layer | {"global_head_dim": 16},
    "gemma4_unified": {"text_config": _gemma | {"global_head_dim": 16}},
    "gemma4_unified_text": _gemma | {"global_head_dim": 16},
    "granitemoehybrid": _dense | {"layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 96},
    "helium": _dense | {"num_key_value_heads": 4, "head_dim": 16},
    "hunyuan_v1_dense": _dense | {"head_dim": 16},
    "hunyuan_v1_moe": _dense | {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "ministral": _dense | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3},
    "nemotron": _dense | {"head_dim": 16},
    "phi4_multimodal": _dense | {"audio_config": {"hidden_size": 32, "num_blocks": 1}, "vision_config": {"hidden_size": 32}},
}
PROMPTS = [torch.randint(4, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 6)]


def main() -> None:
    """Tries all architectures, or those that `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, separated by commas")
    only = [name for name in parser.parse_args().only.split(",") if name]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"] if RESULTS.is_file() else {}
    for name in only or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in kept]:
        began = time.perf_counter()
        kept[name] = attempt(name)
        print(
            f"{name:28} {kept[name]['outcome']:10} {kept[name]['reason'][:90]} {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        content = {
            "command": "python -m benchmarks.architectures",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "architectures": dict(sorted(kept.items())),
        }
        write_text(RESULTS, json.dumps(content, indent=1) + "\n")
    write_text(PAGE, page(json.loads(RESULTS.read_text(encoding="utf-8"))))


def attempt(name: str) -> dict[str, str]:
    """What happens to one architecture: {"class", "outcome": "right", "wrong", "refused" or "not tried", "reason"}."""
    result = {"class": str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]), "outcome": "not tried", "reason": ""}
    try:
        base = tiny(name)
        with torch.inference_mode():
            base(input_ids=torch.arange(4, 8)[None])
    except Exception as error:  # whatever the architecture raises at its default configuration, made small
        return result | {"reason": f"no small model of its default configuration: {described(error)}"}
    try:
        model = DynaMoForCausalLM.from_base(base, 3, init="copy").eval()
    except InputError as error:
        return result | {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        return result | {"outcome": "wrong", "reason": described(error)}
    try:
        fault = differing_text(base, model)
        if not fault:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                fault = differing_text(base, DynaMoForCausalLM.from_pretrained(folder).eval())
                fault = fault and "after saving and loading, " + fault
    except Exception as error:
        fault = described(error)
    note = (
        "" if fault or pads(base) else "transformers' own batches change with padding; texts are those of each prompt alone"
    )
    return result | {"outcome": "wrong" if fault else "right", "reason": fault or note}


def differing_text(base: PreTrainedModel, model: DynaMoForCausalLM) -> str:
    """What continues differently from the base's own `generate`, or "": two prompts alone, three in a padded batch."""
    alone = [continued(base, [prompt])[0] for prompt in PROMPTS]
    if any(continued(model, [prompt])[0] != text for prompt, text in zip(PROMPTS[:2], alone, strict=False)):
        return "the text of one prompt is not the base's own"
    expected = continued(base, PROMPTS) if pads(base) else alone
    return "" if continued(model, PROMPTS) == expected else "a text of a batch is not the base's own"


def pads(base: PreTrainedModel) -> bool:
    """Whether the base's own `generate` continues prompts in a padded batch as it continues each alone."""
    return continued(base, PROMPTS) == [continued(base, [prompt])[0] for prompt in PROMPTS]


def continued(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """The new tokens after each prompt, padded on the left to the longest, greedily."""
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()  # type: ignore[operator]


def tiny(name: str) -> PreTrainedModel:
    """A tiny model of an architecture's default configuration. Raises whatever the architecture raises, or ValueError."""
    config = CONFIG_MAPPING[name](**SMALL.get(name, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    base_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base_class = base_class[0] if isinstance(base_class, tuple) else base_class
    if name in SMALL:
        torch.manual_seed(0)
        base = base_class._from_config(config).eval()
        sharpen(base)
        return base
    with torch.device("meta"):
        size = base_class._from_config(tiny_config(config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    return tiny_base(base_class, config)


def page(content: dict[str, Any]) -> str:
    """The results as Markdown: names by outcome, refusals and faults by reason."""
    names: dict[str, dict[str, list[str]]] = {"right": {}, "wrong": {}, "refused": {}, "not tried": {}}
    for name, each in content["architectures"].items():
        reason = "" if each["outcome"] == "not tried" else each["reason"].replace(each["class"], "it").replace("\n", " ")
        names[each["outcome"]].setdefault(reason, []).append(name)
    lines = [
        "# Architectures",
        "",
        "Every model type that transformers opens as a causal language model, on a tiny random model of its configuration:",
        f"`{content['command']}`, transformers {content['transformers']}, torch {content['torch']}.",
        "",
        "* Right: strict greedy text equals the base's own `generate`, for prompts alone and three in a padded batch,",
        "  before and after saving and loading.",
        "* Refused: `from_base` says why. Bases whose code ignores masks, positions or the cache are found by trying it.",
        "* Not tried: transformers makes no small model of the default configuration.",
    ]
    for outcome, reasons in names.items():
        if not reasons:
            continue
        lines += ["", f"## {outcome.capitalize()}: {sum(map(len, reasons.values()))}", ""]
        for reason, group in sorted(reasons.items()):
            text = ", ".join(group) + (f": {reason}" if reason else "")
            lines += textwrap.wrap("* " + text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def described(error: BaseException) -> str:
    """An error's class and the first line of its text, at most 120 characters."""
    return f"{type(error).__name__}: {first_line(error)}"[:120]


if __name__ == "__main__":
    main()
