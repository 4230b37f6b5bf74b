"""The whole benchmark: models, prompts and methods from a user's options, and the record of all races.

A record holds plain numbers and names no folder; `tables` shows it, `evaluation.results_file` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.backbone.base_model import fingerprint, load_base
from dynamo_lm.backbone.token_limits import context_limit, token_ids
from dynamo_lm.bench import llama_cpp, methods, summary, tables
from dynamo_lm.bench import prompts as prompt_sets
from dynamo_lm.bench.methods import Method
from dynamo_lm.bench.options import PromptOptions, RaceOptions
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.race import left_out, race
from dynamo_lm.bench.runners import BenchmarkContext
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.evaluation.completion.prompts import data_folder
from dynamo_lm.model.loading import open_model, resolve
from dynamo_lm.model.modeling import DynaMoForCausalLM

EPS_B = 0.3  # raced where the model has no calibrated one


def open_context(model: DynaMoForCausalLM, tokenizer: Any, options: RaceOptions) -> BenchmarkContext:
    """Everything that is raced with, in one precision on one device.

    Raises:
        InputError: --also or --draft names a model that does not fit.
    """
    ends = tuple(token_ids(model.generation_config.eos_token_id))
    models = {"model": model}
    precision = str(model.dtype).removeprefix("torch.")
    for folder in options.also:
        other = open_model(resolve(folder), dtype=precision, device=str(model.device), tokenizer=tokenizer)
        if fingerprint(other.base) != fingerprint(model.base):
            raise InputError(f'"{folder}" has another base than the model; --also compares heads on the same base.')
        name = Path(folder.rstrip("/")).name
        if name in models:
            raise InputError(f'"{folder}" has the name of another model; give folders with names of their own.')
        models[name] = other
    draft = None
    if options.draft is not None:
        draft = load_base(resolve(options.draft), dtype=model.dtype).to(model.device).eval()  # type: ignore[arg-type]
        if draft.config.get_text_config().vocab_size != model.config.vocab_size:
            raise InputError(f'"{options.draft}" has another vocabulary than the model; --draft needs the same tokenizer.')
    return BenchmarkContext(models, ends, context_limit(model.config), draft)


def all_methods(context: BenchmarkContext, options: RaceOptions, more: Sequence[Method] = ()) -> list[Method]:
    """Every method for this model: greedy before sampled, one token per step before several.

    Raises:
        InputError: --heads is not a number of heads that the model has.
    """
    model = context.model
    heads = options.heads or model.num_heads
    if not 1 < heads <= model.num_heads:
        raise InputError(f"--heads is {heads}; this model has 2 to {model.num_heads}.")
    off_heads = min(heads, model.cooccurrence.order) if model.cooccurrence is not None else 1
    eps_b = getattr(model.generation_config, "eps_b", None)
    candidates = [
        *methods.ONE_TOKEN,
        *methods.PEERS,
        *([methods.llama_cpp(options.gguf)] if options.gguf is not None else []),
        *more,
        *(methods.also(name, other.num_heads) for name, other in context.models.items() if name != "model"),
        *methods.heads(heads, off_heads=off_heads, eps_b=EPS_B if eps_b is None else eps_b),
        *methods.ONE_TOKEN_SAMPLED,
    ]
    return sorted(candidates, key=lambda method: (method.kind != "greedy", not method.one_token))


def run(
    context: BenchmarkContext,
    tokenizer: Any,
    prompts: PromptOptions,
    options: RaceOptions,
    *,
    name: str,
    command: Sequence[str],
    out: Path | None = None,
    more: Sequence[Method] = (),
    texts: Sequence[Prompt] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Race at every context length and batch size; close the context.

    Args:
        name: what the user calls the model.
        command: the arguments given, for the record.
        out: a folder for the record, as bench.json.
        more: methods beside those of `all_methods`, by engines that are in `runners.ENGINES`.
        texts: prompts of a model with random weights, instead of those that the options name.
    """
    model = context.model
    candidates = all_methods(context, options, more)
    table = model.cooccurrence
    settings = {
        "repetitions": options.repetitions,
        "max_new_tokens": prompts.max_new_tokens,
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
        for length in prompts.lengths:
            chosen_texts = list(texts) if texts is not None else read_texts(prompts, context, tokenizer, length)
            chosen_texts, cut = prompt_sets.fitted(chosen_texts, context.length, prompts.max_new_tokens)
            for size in options.batch_sizes:
                chosen = methods.choose(candidates, batch=size, sampled=options.sampled, only=options.only)
                uncompiled = [method for method in chosen if options.compile or not method.compiles]
                done = race(
                    context,
                    chosen_texts,
                    uncompiled,
                    batch=size,
                    max_new_tokens=prompts.max_new_tokens,
                    repetitions=options.repetitions,
                    seed=options.seed,
                    progress=progress,
                )
                without = [left_out(method, "Left out with --no-compile.") for method in chosen if method not in uncompiled]
                record["races"].append(
                    {
                        "context": length,
                        "batch": size,
                        "prompts": len(chosen_texts),
                        "cut_prompts": cut,
                        "repetitions": done.repetitions,
                        "methods": summary.summaries(done, context, trained=texts is None),
                        "skipped": [*done.skipped, *without],
                        "floor": summary.floor(done, context, prompts.max_new_tokens),
                    }
                )
    finally:
        for close in context.close:
            close()
    if out is not None:
        results_file.save(out, record)
    return record


def read_texts(options: PromptOptions, context: BenchmarkContext, tokenizer: Any, length: str) -> list[Prompt]:
    """The prompts as they are, or, for "long", after a long context."""
    if options.spec_bench is not None:
        texts = prompt_sets.read_spec_bench(options.spec_bench, tokenizer, limit=options.limit)
    else:
        texts = prompt_sets.read(options.prompts, tokenizer, limit=options.limit)
    if length == "short":
        return texts
    wanted = options.context_tokens or int(prompt_sets.LONG * context.length)
    if wanted + options.max_new_tokens > context.length:
        raise InputError(
            f"A context of {wanted} tokens and {options.max_new_tokens} new ones exceed the model's {context.length}; lower "
            "--context-tokens or --max-new-tokens."
        )
    file = options.filler or data_folder().parent / "stories" / "tinystories.jsonl"
    if not file.exists():
        raise InputError(f'There is no "{file}" to put before the prompts; name a text with --filler.')
    return prompt_sets.lengthened(texts, wanted, prompt_sets.filler(file, tokenizer, wanted * min(len(texts), 64)))
