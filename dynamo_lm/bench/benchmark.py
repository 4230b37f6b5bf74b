"""The whole benchmark: methods from a user's options, and the record of all races.

A record holds plain numbers and names no folder; `tables` shows it, `evaluation.results_file` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.backbone.token_limits import context_limit, token_ids
from dynamo_lm.bench import methods, summary, tables
from dynamo_lm.bench.methods import Method
from dynamo_lm.bench.options import RaceOptions
from dynamo_lm.bench.prompts import Prompt, fitted
from dynamo_lm.bench.race import left_out, race
from dynamo_lm.bench.runners import BenchmarkContext
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.export import llama_cpp
from dynamo_lm.model.modeling import DynaMoForCausalLM

EPS_B = 0.3  # raced where the model has no calibrated one


def open_context(model: DynaMoForCausalLM) -> BenchmarkContext:
    """What runners need of the model."""
    ends = tuple(token_ids(model.generation_config.eos_token_id))
    return BenchmarkContext({"model": model}, ends, context_limit(model.config))


def all_methods(context: BenchmarkContext, options: RaceOptions, more: Sequence[Method] = ()) -> list[Method]:
    """Every method for this model: greedy before sampled, one token per step before several.

    With --synthetic-acceptance only one token per step, and drafts that are accepted by chance.

    Raises:
        InputError: --heads is not a number of heads that the model has.
    """
    model = context.model
    heads = options.heads or model.num_heads
    if not 1 < heads <= model.num_heads:
        raise InputError(f"--heads is {heads}; this model has 2 to {model.num_heads}.")
    if options.synthetic_acceptance is not None:
        return [*methods.ONE_TOKEN, *methods.synthetic(heads, options.synthetic_acceptance)]
    off_heads = min(heads, model.cooccurrence.order) if model.cooccurrence is not None else 1
    eps_b = getattr(model.generation_config, "eps_b", None)
    candidates = [
        *methods.ONE_TOKEN,
        methods.PROMPT_LOOKUP,
        *([methods.llama_cpp(options.gguf)] if options.gguf is not None else []),
        *more,
        *methods.heads(heads, off_heads=off_heads, eps_b=EPS_B if eps_b is None else eps_b),
        *methods.ONE_TOKEN_SAMPLED,
    ]
    return sorted(candidates, key=lambda method: (method.kind != "greedy", not method.one_token))


def run(
    context: BenchmarkContext,
    prompts: Mapping[str, Sequence[Prompt]],
    options: RaceOptions,
    *,
    max_new_tokens: int,
    name: str,
    command: Sequence[str],
    out: Path | None = None,
    more: Sequence[Method] = (),
    trained: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Race at every context length and batch size; close the context.

    Args:
        prompts: by context length, "short" or "long".
        name: what the user calls the model.
        command: the arguments given, for the record.
        out: a folder for the record, as bench.json.
        more: methods beside those of `all_methods`, by engines that are in `runners.ENGINES`.
        trained: whether the weights are, so that texts mean something.
    """
    model, synthetic = context.model, options.synthetic_acceptance is not None
    candidates = all_methods(context, options, more)
    table = model.cooccurrence
    settings = {
        "repetitions": options.repetitions,
        "max_new_tokens": max_new_tokens,
        "heads": options.heads or model.num_heads,
        "table_rows": [table.num_rows(order) for order in range(1, table.order + 1)] if table is not None else [],
        "also": [other for other in context.models if other != "model"],
        "draft_parameters": context.draft.num_parameters() if context.draft is not None else None,
    }
    # Of absolute paths the last part only, so that a record names no machine's folders.
    command = [Path(word).name if word.startswith(("/", "~")) else word for word in command]
    record = results_file.begin("bench", command, model, name, seed=options.seed, settings=settings)
    if out is not None:
        results_file.check_folder(out, record["model"])
    record |= {"machine": tables.machine(model.device), "peers": {"llama.cpp": llama_cpp.facts()}, "races": []}
    try:
        for length, texts in prompts.items():
            texts, cut = fitted(texts, context.length, max_new_tokens)
            for size in options.batch_sizes:
                chosen = methods.choose(candidates, batch=size, sampled=options.sampled, only=options.only)
                uncompiled = [method for method in chosen if options.compile or not method.compiles]
                done = race(
                    context,
                    texts,
                    uncompiled,
                    batch=size,
                    max_new_tokens=max_new_tokens,
                    repetitions=options.repetitions,
                    seed=options.seed,
                    progress=progress,
                )
                without = [left_out(method, "Left out with --no-compile.") for method in chosen if method not in uncompiled]
                record["races"].append(
                    {
                        "context": length,
                        "batch": size,
                        "prompts": len(texts),
                        "cut_prompts": cut,
                        "repetitions": done.repetitions,
                        "methods": summary.summaries(done, context, trained=trained and not synthetic),
                        "skipped": [*done.skipped, *without],
                        "floor": summary.floor(done, context, max_new_tokens),
                    }
                )
    finally:
        for close in context.close:
            close()
    if out is not None:
        results_file.save(out, record)
    return record
