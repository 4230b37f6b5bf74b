"""Which of transformers' decoder architectures carry heads: each is tried on a tiny random model of its own configuration.

    python -m benchmarks.architectures [--only llama,gpt2]

For every model type that transformers opens as a causal language model: heads are added (which checks the base's code, see
`dynamo_lm.model.base_check`), and three prompts of different lengths are continued strictly and greedily; the text must be
that of the base's own `generate`. Writes results/architectures.json after every one and docs/architectures.md at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.backbone.tiny_base import tiny_base, tiny_config
from dynamo_lm.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "architectures.json", ROOT / "docs" / "architectures.md"
LARGEST = 3e7  # parameters of a tiny model; configurations that stay larger are those of several models in one
TOKENS = 16  # of each continuation
LENGTHS = (3, 9, 6)  # of the prompts


def main() -> None:
    """Tries all architectures, or those that `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, separated by commas")
    names = [name for name in parser.parse_args().only.split(",") if name] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"] if RESULTS.is_file() else {}
    for name in names:
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
    write_text(PAGE, page(content))


def attempt(name: str) -> dict[str, str]:
    """What happens to one architecture: {"class", "outcome": "exact", "differs", "refused" or "not tried", "reason"}."""
    result = {"class": str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]), "outcome": "not tried", "reason": ""}
    try:
        base = tiny(name)
        with torch.inference_mode():
            base(input_ids=torch.arange(4, 8)[None])
    except Exception as error:  # whatever the architecture raises at its default configuration, made small
        return result | {"reason": f"no small model of its default configuration: {first_line(error)}"}
    try:
        model = DynaMoForCausalLM.from_base(base, 3, init="copy").eval()
    except InputError as error:
        return result | {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        return result | {"outcome": "fails", "reason": first_line(error)}
    prompts = [torch.randint(4, 400, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    ids = torch.stack([torch.nn.functional.pad(prompt, (max(LENGTHS) - len(prompt), 0), value=1) for prompt in prompts])
    mask = torch.tensor([[0] * (max(LENGTHS) - length) + [1] * length for length in LENGTHS])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    try:
        for row in (slice(0, 1), slice(1, 2), slice(0, 3)):
            width = LENGTHS[row.start] if row.stop - row.start == 1 else max(LENGTHS)
            inputs: dict[str, Any] = {"inputs": ids[row, -width:], "attention_mask": mask[row, -width:], **options}
            expected = base.generate(**inputs)
            if not torch.equal(model.generate(**inputs), expected):
                what = "the text of a batch" if row.stop - row.start > 1 else "the text of one prompt"
                return result | {"outcome": "differs", "reason": f"{what} is not the base's own"}
    except Exception as error:
        return result | {"outcome": "fails", "reason": first_line(error)}
    return result | {"outcome": "exact"}


def tiny(name: str) -> PreTrainedModel:
    """A tiny model of an architecture's default configuration. Raises whatever the architecture raises, or ValueError."""
    config = CONFIG_MAPPING[name]()
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    base_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base_class = base_class[0] if isinstance(base_class, tuple) else base_class
    with torch.device("meta"):
        size = base_class._from_config(tiny_config(config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    return tiny_base(base_class, config)


def page(content: dict[str, Any]) -> str:
    """The table as Markdown."""
    counts: dict[str, int] = {}
    for each in content["architectures"].values():
        counts[each["outcome"]] = counts.get(each["outcome"], 0) + 1
    lines = [
        "# Architectures",
        "",
        "Every model type that transformers opens as a causal language model, on a tiny random model of its default",
        f"configuration (`{content['command']}`, transformers {content['transformers']}, torch {content['torch']}).",
        "",
        "* exact: strict greedy text equals the base's own `generate`, for two prompts alone and three in a padded batch.",
        "* refused: `from_base` says why. Bases whose code ignores masks, positions or the cache are found by trying it.",
        "* not tried: transformers makes no small model of the default configuration.",
        "",
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".",
        "",
        "| model type | class | outcome | reason |",
        "|---|---|---|---|",
    ]
    for name, each in content["architectures"].items():
        reason = each["reason"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {each['class']} | {each['outcome']} | {reason} |")
    return "\n".join(lines) + "\n"


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its text, at most 120 characters."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:120]


if __name__ == "__main__":
    main()
