"""Strict sampling as a statistical test: texts that were drafted and verified against the base's exact distribution.

    python -m benchmarks.strict_sampling                        # and again with DYNAMO_LM_KERNELS=0, also at the same time

Tiny random models, so that a draw costs milliseconds and the exact joint of the next three tokens can be enumerated: one
forward of the base over every prefix, and the warpers written out in float64. Three prompts of different lengths stand in
every batch. The triples that follow them are compared with the exact joint by a chi-square test; those with less than five
expected draws are pooled, likely with likely. The p-values of all settings are corrected together by Holm's method. A
control, which is not exact by design, shows what the test finds.

Settings take turns in blocks, so that a run that is stopped has drawn about equally often for each; the next run goes on.
Counts stay in results/strict_sampling, p-values go to results/strict_sampling.json and .md after every block.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.files import write_text
from dynamo_lm.kernels import loader

ROOT = Path(__file__).parents[1]
COUNTS, RESULTS = ROOT / "results" / "strict_sampling", ROOT / "results" / "strict_sampling.json"
PROMPTS = ([5, 3, 9], [1, 7, 7, 2, 4, 8], [6, 0, 1, 2])
DRAWS, BLOCK = 40_000, 2_000  # of a setting in the end; at a time, which is also the largest batch
LEVEL = 0.01  # of all tests together
WARPS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.5": {"temperature": 1.5},
    "top-k 4": {"top_k": 4},
    "top-p 0.8": {"top_p": 0.8},
    "min-p 0.15": {"min_p": 0.15},
    "repetition penalty 1.3": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}
CONTROLS: dict[str, dict[str, Any]] = {"budget of 0.3 nats": {"verify": 0.3}}


class Setting(NamedTuple):
    drafts: str  # see `drafting_model`
    warp: str
    rows: int  # texts of a batch, at most
    draws: int  # in the end

    def file(self, kernels: bool) -> str:
        return f"{self.drafts}, {self.warp}, {self.rows}, {'kernels' if kernels else 'torch'}.npz"


SETTINGS = [
    *(Setting("table", warp, BLOCK, DRAWS) for warp in WARPS),
    *(
        Setting(drafts, warp, BLOCK, DRAWS)
        for drafts in ("heads", "coupling", "table and coupling", "sequential head", "table, 64 tokens")
        for warp in ("top-p 0.8", "all")
    ),
    *(Setting("table", "all", rows, DRAWS // 4) for rows in (1, 4)),
    *(Setting("table", control, BLOCK, BLOCK) for control in CONTROLS),
]


# ---------------------------------------------------------------- models


def random_base(vocabulary: int, layers: int = 3) -> PreTrainedModel:
    """A random Llama whose distributions depend on all tokens before and are neither flat nor certain."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
        base.lm_head.weight.normal_(0, 0.2 if vocabulary < 50 else 0.5)
    return base


def drafting_model(drafts: str) -> DynaMoForCausalLM:
    """That base with heads that draft in the named way: partly right, so that drafts are accepted and rejected."""
    vocabulary = 64 if "64" in drafts else 10
    rank = 8 if "coupling" in drafts else 0
    base = random_base(vocabulary, 7 if drafts == "sequential head" else 3)  # the fewest that such a head reads from
    if drafts == "sequential head":
        model = DynaMoForCausalLM.from_base(base, 4, head="eagle3", init="copy")
    else:
        model = DynaMoForCausalLM.from_base(base, 4, init="copy", coupling_rank=rank)
    if model.coupling is not None:
        with torch.no_grad():
            for up in model.coupling.ups:
                up.normal_(0, 1.0)
    if "table" in drafts:
        stream = np.random.default_rng(0).integers(0, vocabulary, 50 * vocabulary)
        model.cooccurrence = count([stream], vocab_size=vocabulary, order=3, description="random tokens")
    return model.eval()


# ---------------------------------------------------------------- what is right


def warped(
    logits: Tensor,
    prefixes: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """What is sampled from, as the terms are defined and in transformers' order, in float64; no fast path, no library.

    Args:
        logits: the base's after each prefix, (prefixes, vocabulary).
        prefixes: all tokens before, (prefixes, length).

    Returns:
        Probabilities, (prefixes, vocabulary).
    """
    result = []
    for row, prefix in zip(logits.double(), prefixes, strict=True):
        for token in set(prefix.tolist()):
            row[token] = row[token] / repetition_penalty if row[token] > 0 else row[token] * repetition_penalty
        p = (row / temperature).softmax(-1)
        order = p.argsort(descending=True)
        if top_k:
            p[order[top_k:]] = 0
            p = p / p.sum()
        likelier = p[order].cumsum(-1) - p[order]  # mass of the tokens before each
        p[order[likelier >= top_p]] = 0
        p = p / p.sum()
        p[p < min_p * p.max()] = 0
        result.append(p / p.sum())
    return torch.stack(result)


@torch.inference_mode()
def exact_joint(base: PreTrainedModel, prompt: list[int], how: dict[str, Any]) -> Tensor:
    """Probability of every triple of tokens after a prompt, (vocabulary ** 3,), first token slowest."""
    prefixes, joint = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        p = warped(base(input_ids=prefixes).logits[:, -1].clone(), prefixes, **how)
        joint = (joint[:, None] * p).flatten()
        vocabulary = p.shape[1]
        new = torch.arange(vocabulary).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocabulary, 0), new], 1)
    return joint


def p_value(seen: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Of a chi-square test of counts against expected ones, and its degrees of freedom; cells below 5 are pooled."""
    if seen[expected < 1e-9].sum():
        return 0.0, 0  # something impossible was drawn
    order = np.argsort(expected)
    pools = np.cumsum(expected[order]) // 5  # those below 5, likely with likely, become pools of about 5 to 10
    small = expected[order] < 5
    pools[~small] = pools[small].max(initial=0) + 1 + np.arange((~small).sum())
    _, pools = np.unique(pools, return_inverse=True)
    n, e = np.bincount(pools, seen[order]), np.bincount(pools, expected[order])
    if len(e) > 1 and e[0] < 5:  # the first pool ends where the sum passes 5
        n, e = np.append(n[0] + n[1], n[2:]), np.append(e[0] + e[1], e[2:])
    half = torch.tensor([(len(e) - 1) / 2, ((n - e) ** 2 / e).sum() / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item(), len(e) - 1


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p-values, in the order given."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


# ---------------------------------------------------------------- draws


def draw(model: DynaMoForCausalLM, how: dict[str, Any], draws: int, rows: int, seed: int) -> tuple[np.ndarray, int, int]:
    """Draws four tokens behind each prompt in turn.

    Args:
        how: the warp, as arguments of `generate`, and verify.
        rows: texts of a batch.
        seed: of the first text, the next ones have the following numbers.

    Returns:
        Counts of the first three tokens, (prompts, vocabulary ** 3), and how many drafts were verified and accepted.
    """
    vocabulary, longest = model.config.vocab_size, max(map(len, PROMPTS))
    counts = np.zeros((len(PROMPTS), vocabulary**3), np.int64)
    proposed = accepted = 0
    for start in range(0, draws, rows):
        which = torch.arange(start, min(start + rows, draws)) % len(PROMPTS)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])[which]
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])[which]
        options: dict[str, Any] = {"top_k": 0, "pad_token_id": 0, "seed": seed + start} | how
        output: Any = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=True, return_dict_in_generate=True, **options
        )
        cells = output.sequences[:, longest : longest + 3] @ torch.tensor([vocabulary**2, vocabulary, 1])
        np.add.at(counts, (which.numpy(), cells.numpy()), 1)
        proposed += sum(sum(each.proposed) for each in output.statistics)
        accepted += sum(sum(each.accepted) for each in output.statistics)
    return counts, proposed, accepted


def tested(counts: np.ndarray, joint: np.ndarray) -> tuple[float, int]:
    """`p_value` of counts, (prompts, cells), against the exact joint of each prompt."""
    return p_value(counts.ravel(), (joint * counts.sum(1, keepdims=True)).ravel())


def add_block(setting: Setting, number: int, kernels: bool, model: DynaMoForCausalLM) -> None:
    """Draws once more for a setting, unless it has all its draws, and keeps counts and the block's p-value."""
    path = COUNTS / setting.file(kernels)
    kept = dict(np.load(path)) if path.is_file() else {}
    done = int(kept["counts"].sum()) if kept else 0
    if done >= setting.draws:
        return
    warp = WARPS.get(setting.warp, {})
    if not kept:
        kept["joint"] = np.stack([exact_joint(model.base, prompt, warp).numpy() for prompt in PROMPTS])
        kept |= {"counts": np.zeros(kept["joint"].shape, np.int64), "drafts": np.zeros(2, np.int64), "blocks": np.zeros(0)}
    draws = min(BLOCK if setting.rows > 4 else BLOCK // 8, setting.draws - done)
    seed = (2 * number + kernels) * 1_000_000 + done
    how = CONTROLS.get(setting.warp, warp)
    counts, proposed, accepted = draw(model, how, draws, setting.rows, seed)
    kept["counts"] += counts
    kept["drafts"] += [proposed, accepted]
    kept["blocks"] = np.append(kept["blocks"], tested(counts, kept["joint"])[0])
    COUNTS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **kept)


def table() -> list[dict[str, Any]]:
    """One row for every setting that has draws."""
    rows = []
    for setting in SETTINGS:
        for kernels in (True, False):
            path = COUNTS / setting.file(kernels)
            if not path.is_file():
                continue
            kept = np.load(path)
            p, degrees = tested(kept["counts"], kept["joint"])
            rows.append(
                {
                    "drafts": setting.drafts,
                    "warp": setting.warp,
                    "batch": setting.rows,
                    "kernels": kernels,
                    "draws": int(kept["counts"].sum()),
                    "accepted": round(float(kept["drafts"][1] / max(1, kept["drafts"][0])), 3),
                    "degrees": degrees,
                    "p": p,
                    "least_p_of_blocks": min(kept["blocks"].tolist()),
                    "blocks": len(kept["blocks"]),
                }
            )
    exact = [row for row in rows if row["warp"] not in CONTROLS]
    for row, corrected in zip(exact, holm([row["p"] for row in exact]), strict=True):
        row["p_holm"] = corrected
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    exact, controls = [row for row in rows if "p_holm" in row], [row for row in rows if "p_holm" not in row]
    found = sum(row["p_holm"] < LEVEL for row in exact)
    lines = [
        "# Strict sampling against the exact joint of three tokens",
        "",
        f"`python -m benchmarks.strict_sampling`: {sum(row['draws'] for row in exact):,} draws in {len(exact)} settings;",
        f"{found} of them differ from the base's distribution at a level of {LEVEL:g} for all tests together (Holm).",
        "Least p over the blocks of a setting is what the unluckiest of so many looks would have shown.",
        "",
        "| drafts | warp | batch | kernels | draws | drafts accepted | degrees | p | p (Holm) | least p, blocks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in exact + controls:
        holm_p = f"{row['p_holm']:.2g}" if "p_holm" in row else "control"
        least = f"{row['least_p_of_blocks']:.2g} of {row['blocks']}"
        lines.append(
            f"| {row['drafts']} | {row['warp']} | {row['batch']} | {'on' if row['kernels'] else 'off'} | {row['draws']:,} | "
            f"{row['accepted']:.0%} | {row['degrees']} | {row['p']:.2g} | {holm_p} | {least} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draws for all settings in turn, until each has its number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='settings whose name begins so, such as "table, top-p 0.8"')
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kernels = loader.available(wait=True)
    models = {
        drafts: drafting_model(drafts)
        for drafts in dict.fromkeys(s.drafts for s in SETTINGS if s.file(kernels).startswith(only))
    }
    for turn in range(max(math.ceil(8 * setting.draws / BLOCK) for setting in SETTINGS)):
        for number, setting in enumerate(SETTINGS):
            if not setting.file(kernels).startswith(only):
                continue
            began = time.process_time()
            add_block(setting, number, kernels, models[setting.drafts])
            if (seconds := time.process_time() - began) > 0.1:
                print(f"{turn:3} {setting.drafts}, {setting.warp}, {setting.rows}: {seconds:.1f} s", flush=True)
                rows = table()
                about = {"command": "python -m benchmarks.strict_sampling", "level": LEVEL, "settings": rows}
                write_text(RESULTS, json.dumps(about, indent=1) + "\n")
                write_text(RESULTS.with_suffix(".md"), page(rows))


if __name__ == "__main__":
    main()
