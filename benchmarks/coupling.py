"""Heads alone, counted mask, learned coupling, both: `python -m benchmarks.coupling --model .. > results/coupling.json`.

Four kinds of draft on the same weights, at several settings: "no coupling" is the same model without its coupling. Counts
tokens and forwards, which do not depend on the machine. Without verification likelier text may only be duller text: read
log-likelihood beside distinct bigrams, and both at equal tokens per step. `held_out` scores the drafts' distributions
where nothing is decoded: on true texts, after true tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.story import PROMPTS
from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.bench.summary import log_likelihood
from dynamo_lm.data.token_store import TokenStore
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.sampling.drafting import conditional
from dynamo_lm.sampling.top_k import HeadCandidates, pairwise_correction

TOP_K = 50
EVERY = 5  # of a held-out text, this share of its positions is drafted from


@dataclass(frozen=True)
class Draft:
    """What the heads' candidates are weighted with."""

    coupled: bool
    alpha_c: float

    @property
    def name(self) -> str:
        parts = [f"mask {self.alpha_c:g}"] * (self.alpha_c > 0) + ["coupling"] * self.coupled
        return " + ".join(parts) or "heads alone"


DRAFTS = [
    *(Draft(False, alpha_c) for alpha_c in (0.0, 1.0, 0.5)),
    *(Draft(True, alpha_c) for alpha_c in (0.0, 1.0, 0.5, 0.25)),
]
EPS_B = (0.7, 0.5, 0.3, 0.1)


def settings(num_heads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings compared: names and arguments of `generate`."""
    for n in range(2, num_heads + 1):
        yield f"strict, greedy, n={n}, chain", {"verify": "strict", "num_heads": n, "tree": 0}
    for tree in (7, 15):
        yield f"strict, greedy, n={num_heads}, tree={tree}", {"verify": "strict", "num_heads": num_heads, "tree": tree}
    yield f"0.1 nats, greedy, n={num_heads}, chain", {"verify": 0.1, "num_heads": num_heads, "tree": 0}
    yield f"strict, sampled, n={num_heads}", {"verify": "strict", "num_heads": num_heads, "do_sample": True}
    for eps_b in EPS_B:
        yield (
            f"off, n={num_heads}, eps_b={eps_b}",
            {"verify": "off", "num_heads": num_heads, "do_sample": True, "eps_b": eps_b},
        )


class Run:
    """All prompts as one batch, rows apart: sampled methods once per seed, and their numbers over all rows."""

    def __init__(self, model: DynaMoForCausalLM, tokenizer: Any, lines: list[str], new_tokens: int, seeds: int):
        self.model, self.new_tokens, self.seeds = model, new_tokens, seeds
        self.prompts = tokenizer(lines, return_tensors="pt", padding=True, padding_side="left")

    def __call__(self, arguments: dict[str, Any]) -> tuple[list[list[int]], dict[str, Any]]:
        """The new tokens by row, and a row of the results."""
        copies = self.seeds if arguments.get("do_sample") else 1
        ids, mask = (self.prompts[name].repeat(copies, 1) for name in ("input_ids", "attention_mask"))
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.new_tokens,
            seed=list(range(len(ids))),
            return_dict_in_generate=True,
            **arguments,
        )
        counted: list[Statistics] = output.statistics
        texts = [row[ids.shape[1] :][: s.new_tokens].tolist() for row, s in zip(output.sequences, counted, strict=True)]
        total = likely = 0.0
        for prompt, keep, new in zip(ids, mask, texts, strict=True):
            whole = torch.cat([prompt[keep.bool()], torch.tensor(new)])
            total, likely = total + len(new), likely + log_likelihood(self.model, whole, int(keep.sum()))
        pairs = [list(pairwise(new)) for new in texts]
        steps = [size for s in counted for size in s.step_sizes]
        return texts, {
            "tokens_per_step": sum(s.new_tokens for s in counted) / sum(s.forwards for s in counted),
            "tokens": sum(s.new_tokens for s in counted),
            "forwards": sum(s.forwards for s in counted),
            "histogram": [steps.count(size) for size in range(1, counted[0].ceiling + 1)],
            "acceptance": [
                sum(s.accepted[i] for s in counted) / max(1, sum(s.proposed[i] for s in counted))
                for i in range(counted[0].ceiling - 1)
            ],
            "log_likelihood": likely / total,
            "distinct_bigrams": sum(len(set(p)) / max(1, len(p)) for p in pairs) / len(pairs),
            "regret_per_token": sum(s.regret for s in counted) / sum(s.scored for s in counted),
        }


@torch.inference_mode()
def held_out(model: DynaMoForCausalLM, store: TokenStore, texts: int) -> dict[str, Any]:
    """The drafts' distributions on texts held out from training, after true tokens, where head i has the true token.

    Returns:
        Per draft and head 2..n: nats per token (of q mixed with 1 % of the uniform), the share of positions at which the
        likeliest is the true one (`top_1`), and the share of a sampled draft that verification would keep, sum min(p, q)
        with the base's own p (`overlap`, over all positions). `in_top_k` is by head, the
        same for all: candidates are those of the heads without coupling.
    """
    extra = range(model.num_heads - 1)
    sums = {draft: {name: [0.0 for _ in extra] for name in ("nats", "top_1", "overlap")} for draft in DRAFTS}
    in_top_k, positions = [0 for _ in extra], 0
    learned, weights = model.coupling, [model.output_weight(head) for head in range(2, model.num_heads + 1)]
    for index in store.split(0.01, seed=0)[1][:texts].tolist():
        tokens = torch.from_numpy(store.document(index).astype("int64"))[: model.config.max_context]
        hidden = model.hidden(tokens[None])[:, 0]  # (n, length, hidden)
        logits = torch.stack([model.readout(state[None], head)[0] for head, state in enumerate(hidden, start=1)])
        base = logits[0].double().softmax(-1)
        for at in range(4, len(tokens) - model.num_heads, EVERY):
            heads = HeadCandidates.top(logits[1:, at], TOP_K, 1.0)
            pairwise = pairwise_correction(
                learned.tokens, *learned.low_rank_factors(hidden[1:, at], torch.from_numpy(heads.ids), weights)
            )
            true = tokens[at + 1 : at + 1 + model.num_heads].tolist()
            positions += 1
            for i in extra:
                hit = (heads.ids[i] == true[i + 1]).nonzero()[0]
                in_top_k[i] += len(hit)
                for draft, row in sums.items():
                    coupling = pairwise if draft.coupled else None
                    text = tokens[: at + 2 + i].numpy()
                    ids, q = conditional(heads, i, text, model.cooccurrence, draft.alpha_c, 1.0, coupling)
                    row["overlap"][i] += float(base[at + 1 + i, ids].numpy().clip(max=q).sum())
                    if len(hit):
                        row["nats"][i] -= math.log(0.99 * q[ids == true[i + 1]].sum() + 0.01 / TOP_K)
                        row["top_1"][i] += float(ids[q.argmax()] == true[i + 1])
    return {
        "texts": texts,
        "positions": positions,
        "in_top_k": [count / positions for count in in_top_k],
        "drafts": {
            draft.name: {
                name: [v / (positions if name == "overlap" else count) for v, count in zip(row, in_top_k, strict=True)]
                for name, row in rows.items()
            }
            for draft, rows in sums.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/coupling/model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1, help="how often each prompt is sampled from")
    parser.add_argument("--texts", type=int, default=20, help="held-out texts")
    parser.add_argument("--tokens", type=Path, default=Path("runs/coupling/tokens"), help="of the coupling's training run")
    arguments = parser.parse_args()
    model = DynaMoForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    coupling = model.coupling
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    run = Run(model, tokenizer, lines, arguments.new_tokens, arguments.seeds)
    truth, one_token = run({"verify": "strict", "num_heads": 1})
    rows = [{"draft": "none", "setting": "one token, greedy", **one_token}]
    rows.append({"draft": "none", "setting": "one token, sampled", **run({"num_heads": 1, "do_sample": True})[1]})
    off = {"verify": "off", "num_heads": 1, "do_sample": True}  # temperature 0.7 and penalty 1.1, as Algorithm 1 has them
    rows.append({"draft": "none", "setting": "one token, off", **run(off)[1]})
    for setting, how in settings(model.num_heads):
        for draft in DRAFTS:
            model.coupling = coupling if draft.coupled else None
            texts, row = run({**how, "alpha_c": draft.alpha_c})
            exact = how["verify"] == "strict" and "do_sample" not in how
            rows.append({"draft": draft.name, "setting": setting, **row, "identical": texts == truth if exact else None})
            print(
                f"{setting:32s} {draft.name:22s} {row['tokens_per_step']:.3f}  ll {row['log_likelihood']:.3f}  "
                f"distinct {row['distinct_bigrams']:.3f}  regret {row['regret_per_token']:.3f}  {rows[-1]['identical']}",
                file=sys.stderr,
                flush=True,
            )
    model.coupling = coupling
    scores = held_out(model, TokenStore(arguments.tokens), arguments.texts)
    for name, score in scores["drafts"].items():
        print(name, {key: [round(value, 3) for value in values] for key, values in score.items()}, file=sys.stderr)
    how_much = {"prompts": len(lines), "new_tokens": arguments.new_tokens, "seeds": arguments.seeds}
    print(json.dumps({**how_much, "rows": rows, "held_out": scores}, indent=1))


if __name__ == "__main__":
    main()
