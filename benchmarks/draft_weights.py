"""What each part of the drafts' weights gives: `python -m benchmarks.draft_weights MODEL ../shared/data OUT --base BASE`.

The base answers first turns of MT-bench greedily, one token at a time. Then all heads draft at every place of these answers,
and strict decoding of chains is walked through on paper: a draft stands if it is the answer's token and those before it
stand. So every row has the same text and the same candidates, and only their weights differ. No time is measured. Adds to
OUT/draft_weights.json, by model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.smollm2 import answered, cell, opened, per_step
from dynamo_lm.cooccurrence.lookup import Lookup
from dynamo_lm.decoding.settings import algorithm_of
from dynamo_lm.files import write_text
from dynamo_lm.kernels import loader
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.sampling import weights
from dynamo_lm.training.loss import coupled_logits, packed_hidden
from recipes.smollm2.prompts import json_lines

NEW_TOKENS, TOP_K = 128, 50
Weigh = Callable[[np.ndarray, int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # text, place, ids, scores


@torch.no_grad()
def candidates(model: DynaMoForCausalLM, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of each head's candidates at every place of a text, (places, n - 1, TOP_K)."""
    text = torch.tensor([tokens])
    states = packed_hidden(model, text, torch.zeros_like(text), torch.arange(len(tokens))[None]).flatten(1, 2)
    found = []
    for head in range(2, model.num_heads + 1):
        own = states[head - 1]
        logits = model.readout(own[None], head)[0].float()
        ids = logits.topk(TOP_K).indices
        if model.coupling is not None:
            before = torch.tensor(tokens[head - 1 :] + [0] * (head - 1))
            logits = coupled_logits(model, head, own, before, logits)
        found.append((ids.numpy(), logits.gather(-1, ids).log_softmax(-1).double().numpy()))
    return np.stack([ids for ids, _ in found], 1), np.stack([scores for _, scores in found], 1)


def walk(tokens: np.ndarray, start: int, ids: np.ndarray, scores: np.ndarray, weigh: Weigh) -> tuple[int, int]:
    """Tokens and steps of an answer that begins at `start`, as strict decoding would take it."""
    place, steps = start - 1, 0  # the place whose next token is verified already
    while place + 2 < len(tokens):
        drafted = 0
        while drafted < ids.shape[1] and place + 2 + drafted < len(tokens):
            text = tokens[: place + 2 + drafted]
            names, q = weigh(text, drafted, ids[place, drafted], scores[place, drafted])
            if names[q.argmax()] != tokens[len(text)]:
                break
            drafted += 1
        place, steps = place + drafted + 1, steps + 1
    return place - start + 1, steps


def hard(lookup: Lookup, text: np.ndarray, ids: np.ndarray, scores: np.ndarray, alpha_c: float) -> np.ndarray:
    """The mask as method.md section 3 has it, where n-grams that were never counted weigh nothing; (k,) scores."""
    for length in range(min(lookup.order - 1, text.size), 0, -1):
        row = lookup.row(text[-length:].tolist())
        if row >= 0:
            seen = lookup.log_after(row, ids, length + 1) - np.maximum(lookup.unigram(ids), -1e30)
            if seen.max() > -np.inf:
                return scores + alpha_c * seen
    return scores


def variants(model: DynaMoForCausalLM) -> dict[str, Weigh]:
    """By name, from the heads alone to what decoding does."""
    assert model.cooccurrence is not None
    table, alpha_c = model.cooccurrence.lookup, algorithm_of(model, verify="strict", sample=False).alpha_c
    before = table.order - 1  # tokens that the table's n-grams have before the last

    def smoothed(text: np.ndarray, ids: np.ndarray, scores: np.ndarray, repeats: bool) -> tuple[np.ndarray, np.ndarray]:
        with (
            patch.object(loader, "_sampler", None),
            patch.object(weights, "LONGEST", weights.LONGEST if repeats else 0),
            patch.object(weights, "_with_followers", lambda followers, ids, scores: (ids, scores)),
        ):
            return weights.weigh(table, text, ids, scores, alpha_c)

    return {
        "heads alone": lambda text, drafted, ids, scores: (ids, scores),
        "mask of unverified text, 0.5": lambda text, drafted, ids, scores: (
            ids,
            hard(table, text[-1 - drafted :], ids, scores, 0.5),
        ),
        "smoothed": lambda text, drafted, ids, scores: smoothed(text[-1 - drafted :], ids, scores, False),
        "smoothed, with the text before": lambda text, drafted, ids, scores: smoothed(text[-before:], ids, scores, False),
        "and the text's own n-grams": lambda text, drafted, ids, scores: smoothed(text, ids, scores, True),
        "and candidates from the text": lambda text, drafted, ids, scores: weights.weigh(table, text, ids, scores, alpha_c),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = opened(arguments.model, arguments.base, "float32")
    prompts = [record["turns"][0] for record in json_lines(arguments.data / "bench" / "mt_bench.jsonl")][: arguments.prompts]
    settings = {"num_heads": 1, "temperature": 0.0}
    answers = sorted(answered(model, tokenizer, prompts, settings, NEW_TOKENS), key=lambda sequence: sequence.number)
    drafted = [(np.array(each.tokens), each.prompt_length, *candidates(model, each.tokens)) for each in answers]
    rows = {
        name: per_step(*np.array([walk(*text, weigh) for text in drafted], float).T)
        for name, weigh in variants(model).items()
    }
    path = arguments.out / "draft_weights.json"
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    everything[Path(arguments.model).name] = {"prompts": len(prompts), "new_tokens": NEW_TOKENS, "rows": rows}
    write_text(path, json.dumps(everything, indent=1) + "\n")
    for name, each in rows.items():
        print(f"| {name} | {cell(each)} |")


if __name__ == "__main__":
    main()
