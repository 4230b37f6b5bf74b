"""One page from a folder of results: reads every record and builds the sections there is data for.

Every part is optional; one that is missing is named with the command that would make it. Needs no model: what only a model
can tell (the joint distribution, which tokens came from one step) is read from records that `look_closer` wrote.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.decoding.joint_heatmap import HeatMap, heatmap
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.report import completion, samples, sections
from dynamo_lm.report.document import Headline, Page, Section, Texts, interval

Record = dict[str, Any]
Records = dict[str, Record]
PROMPT = "Once upon a time, there was"
MEASURED = {  # kind: what it is, and the command after `dynamo-lm`
    "completion": (
        "Speed at the base model's quality, decoding ablations, diversity",
        "eval completion {model} --out {folder}",
    ),
    "perplexity": ("Perplexities, fixed and dynamic", "eval perplexity {model} --data TEXT --out {folder}"),
    "calibration": ("A calibrated eps_b", "calibrate {model} --data TEXT --out {folder}"),
    "nlu": ("Benchmarks of understanding, base beside DynaMo", "eval nlu {model} --out {folder}"),
    "ablation": ("Training ablations", "eval ablation {model} --data TEXT --out {folder}"),
    "heatmap": ("The joint distribution for a prompt", "report {folder} --model {model} --prompt TEXT"),
    "samples": ("Sample texts by step", "report {folder} --model {model}"),
}
SECTIONS: dict[str, Callable[[Record], Section]] = {
    "calibration": sections.calibration,
    "perplexity": sections.perplexity,
    "nlu": sections.nlu,
    "ablation": sections.ablation,
    "heatmap": lambda record: sections.joint(HeatMap(**record["heatmap"]), record),
}


def assemble(folder: Path, *, title: str | None = None) -> Page:
    """The page of a results folder.

    Raises:
        InputError: no results, damaged ones, or results of different models.
    """
    records = results_file.load_all(folder)
    model = next(iter(records.values()))["model"]
    completions = _completions(records)
    page = Page(title or f"{model['name']}, measured", _facts(model))

    def build(kind: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return make(records[kind], *arguments, **options)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"has no usable {error}" if isinstance(error, KeyError) else f"has values that make no sense ({error})"
            command = MEASURED.get(kind.split("-")[0], ("", "eval"))[1].split(" {")[0]
            raise InputError(f'"{folder / kind}.json" {what}; delete it and run `dynamo-lm {command}` again.') from error

    for kind, bench in completions.items():
        page.sections.extend(build(kind, completion.sections, prefix=bench and f"{bench}-", bench=bench))
        page.banners.extend(build(kind, completion.banners))
    if completions:
        main = max(completions, key=lambda kind: len(records[kind]["prompts"]))  # the surest numbers
        page.headlines.extend(build(main, completion.headlines))
        page.lead.extend(build(main, _lead, bool(page.headlines)))
    page.sections.extend(build(kind, make) for kind, make in SECTIONS.items() if kind in records)
    if not page.headlines and "perplexity" in records:
        page.headlines.extend(build("perplexity", _perplexity_headlines))
    for kind, bench in completions.items():
        name = "Texts, step by step" + (f" from {bench}" if bench else "")
        texts = build(kind, lambda _, kind=kind: _texts(folder, kind, records))
        source = build(kind, completion.source, short=True)
        page.sections.append(Section(f"texts{kind.removeprefix('completion')}", name, texts, source))
    page.sections[:] = [section for section in page.sections if section.blocks]
    for kind, (what, command) in MEASURED.items():
        if not (completions if kind == "completion" else kind in records or (kind == "samples" and not completions)):
            path = shlex.quote(model.get("path", model["name"]))
            page.missing.append((what, "dynamo-lm " + command.format(model=path, folder=shlex.quote(str(folder)))))
    return page


def look_closer(
    folder: Path, model: DynaMoForCausalLM, tokenizer: Any, name: str, *, command: Sequence[str], prompt: str | None
) -> None:
    """Adds to the results what needs the model: `heatmap.json` for a prompt, `samples.json` with the texts' steps.

    Without a prompt it is the one shown before, else the first of the completion run.

    Raises:
        InputError: the results are another model's, or the prompt cannot be used.
    """
    records = results_file.load_all(folder)
    measured = next(iter(records.values()))["model"]
    identity = results_file.describe(model, name)["identity"]
    if identity != measured["identity"]:
        raise InputError(
            f'"{name}" ({identity}) is not the model that was measured in "{folder}" '
            f"({measured['name']}, {measured['identity']}); give that one with --model."
        )
    if prompt is None:
        before = records.get("heatmap", {}).get("settings", {}).get("prompt")
        prompt = before or next((p for kind in _completions(records) for p in records[kind].get("prompts") or []), PROMPT)
    joint = heatmap(model, tokenizer, prompt, eps_b=_calibrated(records))
    settings = {"prompt": prompt, "top_k": joint.top_k, "eps_b": joint.eps_b}
    entry = results_file.begin("heatmap", command, model, name, seed=0, settings=settings)
    results_file.save(folder, entry | {"model": measured, "heatmap": vars(joint)})
    pieces = {}
    for kind in _completions(records):
        for text in (text for texts in _chosen(folder, kind, records) for text in texts):
            split = samples.split(text["text"], text["tokens"], text["step_sizes"], tokenizer)
            if split is not None:
                pieces[f"{kind}|{samples.key(text)}"] = split
    if pieces:
        entry = results_file.begin("samples", command, model, name, seed=0, settings={})
        results_file.save(folder, entry | {"model": measured, "pieces": pieces})


def _completions(records: Records) -> dict[str, str]:
    """The kinds of the completion runs among the records, and the name of the benchmark of each; "" for the paper's ten."""
    return {kind: kind.partition("-")[2] for kind in sorted(records) if kind.split("-")[0] == "completion"}


def _facts(model: Record) -> list[tuple[str, str]]:
    heads = model["num_heads"]
    order = model.get("table_order", 0)
    return [
        ("model", f"{model['name']} ({model['architecture']}, {model['base_parameters'] / 1e6:,.1f} M parameters)"),
        ("heads", f"{heads}, {model['overhead']:.1%} more parameters; ceiling {heads} tokens per step"),
        ("tables", f"co-occurrence up to order {order}" if order else "none"),
        ("computed", f"{model['dtype']} on {model['device']}, {model['threads']} thread{'s' * (model['threads'] != 1)}"),
        ("identity", model["identity"]),
    ]


def _lead(entry: Record, quoted: bool) -> list[str]:
    bench = (entry.get("settings") or {}).get("bench", "paper")
    judge = f"Judge: {entry['judge']['name']}." if entry.get("judge") else "No judge."
    return [
        *([completion.WHY_MATCHED] if quoted else []),
        f"At most {entry['ceiling']} tokens per step. Baseline: {entry['baseline']}.",
        f'{judge} Benchmark: "{bench}", {len(entry["prompts"])} prompts x {entry["seeds"]}.',
    ]


def _perplexity_headlines(entry: Record) -> list[Headline]:
    """What the heads predict, where no judge gives a number to begin with."""
    headlines = []
    for head in entry.get("heads", [])[:1]:
        error = head.get("se")
        detail = (
            "" if error is None else f"95 % interval {interval((head['ppl'] - 1.96 * error, head['ppl'] + 1.96 * error))}"
        )
        headlines.append(Headline(f"{head['ppl']:.1f}", "perplexity of the next token (PPL_1)", detail))
    for joint in entry.get("joint", [])[-1:]:
        name = f"perplexity of {joint['heads']} tokens jointly (PPL_1:{joint['heads']})"
        headlines.append(Headline(f"{joint['ppl']:.1f}", name, ""))
    return headlines


def _calibrated(records: Records) -> float | None:
    return (records.get("calibration", {}).get("chosen") or {}).get("eps_b")


def _chosen(folder: Path, kind: str, records: Records) -> list[list[Record]]:
    texts = samples.read(folder / f"{kind}.texts.jsonl", records[kind]["model"]["identity"])
    return samples.choose(texts, len(records[kind].get("prompts", [])), _calibrated(records))


def _texts(folder: Path, kind: str, records: Records) -> list[Texts]:
    pieces = records.get("samples", {}).get("pieces", {})
    own = {key.removeprefix(f"{kind}|"): value for key, value in pieces.items() if key.startswith(f"{kind}|")}
    return samples.blocks(_chosen(folder, kind, records), records[kind]["prompts"], own)
