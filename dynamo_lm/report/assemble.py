"""One page from a folder of results: reads every record, builds the sections there is data for, writes HTML and Markdown.

Every part is optional; one that is missing is named with the command that would make it. Needs no model: what only a model
can say (the joint distribution, which tokens came from one step) is read from records that `look_closer` wrote. The same
folder gives the same bytes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dynamo_lm.decoding.joint_heatmap import HeatMap, heatmap
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.files import write_text
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.report import completion, figures, samples, sections
from dynamo_lm.report.columns import fit
from dynamo_lm.report.document import Banner, Headline, Page, Section, Texts, interval

Records = dict[str, dict[str, Any]]
PROMPT = "Once upon a time, there was"
MEASURED = {  # kind: what it is, and the command behind `dynamo-lm`
    "completion": (
        "Speed at the base model's quality, decoding ablations, diversity",
        "eval completion {model} --out {folder}",
    ),
    "perplexity": ("Perplexities, fixed and dynamic", "eval perplexity {model} --data TEXT --out {folder}"),
    "calibration": ("A calibrated dial", "calibrate {model} --data TEXT --out {folder}"),
    "nlu": ("Benchmarks of understanding, base beside DynaMo", "eval nlu {model} --out {folder}"),
    "ablation": ("Training ablations", "eval ablation {model} --data TEXT --out {folder}"),
    "heatmap": ("The joint distribution for a prompt", "report {folder} --model {model} --prompt TEXT"),
    "samples": ("Sample texts by step", "report {folder} --model {model}"),
}


def assemble(folder: Path, *, title: str | None = None) -> Page:
    """The page of a results folder.

    Raises:
        InputError: no results, damaged ones, or results of different models.
    """
    records = results_file.load_all(folder)
    model = next(iter(records.values()))["model"]
    completions = {kind: entry for kind, entry in records.items() if kind.split("-")[0] == "completion"}
    written: list[Section] = []
    headlines: list[Headline] = []
    lead: list[str] = []
    banners: list[Banner] = []

    def build(kind: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"has no usable {error}" if isinstance(error, KeyError) else f"has values that make no sense ({error})"
            command = MEASURED.get(kind.split("-")[0], ("", "eval"))[1].split(" {")[0]
            raise InputError(f'"{folder / kind}.json" {what}; delete it and run `dynamo-lm {command}` again.') from error

    for kind, entry in sorted(completions.items()):
        bench = kind.partition("-")[2]
        written += build(kind, partial(completion.sections, entry, prefix=bench and f"{bench}-", bench=bench))
        banners += build(kind, partial(completion.banners, entry))
    main = max(completions.values(), key=lambda entry: len(entry["prompts"]), default=None)  # the surest numbers
    if main is not None:
        kind = next(kind for kind, entry in completions.items() if entry is main)
        headlines = build(kind, partial(completion.headlines, main))
        lead = build(kind, partial(_lead, main, bool(headlines)))
    for kind, builder in (
        ("calibration", sections.calibration),
        ("perplexity", sections.perplexity),
        ("nlu", sections.nlu),
        ("ablation", sections.ablation),
    ):
        if kind in records:
            written.append(build(kind, partial(builder, records[kind])))
    if not headlines and "perplexity" in records:
        headlines = build("perplexity", lambda: _perplexity_headlines(records["perplexity"]))
    if "heatmap" in records:
        entry = records["heatmap"]
        written.append(build("heatmap", lambda: sections.joint(HeatMap(**entry["heatmap"]), entry)))
    pieces = records.get("samples", {}).get("pieces", {})
    for kind, entry in sorted(completions.items()):
        shown = build(kind, partial(_texts, folder, kind, records, pieces))
        if shown:
            name = f" from {kind.partition('-')[2]}" if "-" in kind else ""
            written.append(
                Section(
                    f"texts{kind.removeprefix('completion')}",
                    f"Texts, step by step{name}",
                    shown,
                    completion.source(entry, short=True),
                )
            )
    missing = [
        (what, "dynamo-lm " + command.format(model=shlex.quote(model["name"]), folder=shlex.quote(str(folder))))
        for kind, (what, command) in MEASURED.items()
        if (not completions if kind == "completion" else kind not in records) and (kind != "samples" or completions)
    ]
    named = title or f"{model['name']}, measured"
    return Page(named, _facts(model), headlines, lead, banners, [s for s in written if s.blocks], missing)


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
    mine = results_file.describe(model, name)
    if mine["identity"] != measured["identity"]:
        raise InputError(
            f'"{name}" ({mine["identity"]}) is not the model that was measured in "{folder}" '
            f"({measured['name']}, {measured['identity']}); give that one with --model."
        )
    completions = {kind: entry for kind, entry in sorted(records.items()) if kind.split("-")[0] == "completion"}
    if prompt is None:
        before = records.get("heatmap", {}).get("settings", {}).get("prompt")
        prompt = before or next((p for entry in completions.values() for p in entry.get("prompts") or []), PROMPT)
    dial = (records.get("calibration", {}).get("chosen") or {}).get("eps_b")
    found = heatmap(model, tokenizer, prompt, eps_b=dial)
    settings = {"prompt": prompt, "top_k": found.top_k, "eps_b": found.eps_b}
    entry = results_file.begin("heatmap", command, model, name, seed=0, settings=settings)
    results_file.save(folder, entry | {"model": measured, "heatmap": vars(found)})
    pieces = {}
    for kind, completed in completions.items():
        for texts in _chosen(folder, kind, completed, dial):
            for text in texts:
                split = samples.split(text["text"], text["tokens"], text["step_sizes"], tokenizer)
                if split is not None:
                    pieces[f"{kind}|{samples.key(text)}"] = split
    if pieces:
        entry = results_file.begin("samples", command, model, name, seed=0, settings={})
        results_file.save(folder, entry | {"model": measured, "pieces": pieces})


def html(page: Page) -> str:
    """The page as one HTML file that needs nothing else."""
    environment = _environment(autoescape=True)
    environment.globals["inline"] = lambda figure: Markup(figures.inline(figure.svg, figure.name))
    return environment.get_template("report.html.jinja").render(page=page) + "\n"


def markdown(page: Page, figure_folder: str = "figures") -> str:
    """The page as Markdown, with links to its figures in `figure_folder`, relative to the file."""
    environment = _environment(autoescape=False)
    environment.filters |= {"plain": escape, "cell": lambda text: escape(text).replace("|", r"\|"), "fence": fence}
    text = environment.get_template("report.md.jinja").render(page=page, folder=figure_folder)
    return fit(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


def write(page: Page, *, html_file: Path, markdown_file: Path) -> list[Path]:
    """Writes both, and the figures beside the Markdown file; every file whole or not at all.

    Raises:
        InputError: a place that cannot be written to.
    """
    folder = markdown_file.parent / "figures"
    for file in (html_file, markdown_file):
        if file.is_dir():
            raise InputError(f'"{file}" is a folder; name a file.')
    for place in (html_file.parent, folder):  # before figures are drawn, which takes seconds
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'"{place}" cannot be made: {error.strerror}; name another file.') from error
    contents = {folder / f"{figure.name}.svg": figure.svg for figure in page.figures()}
    contents |= {markdown_file: markdown(page), html_file: html(page)}
    for file, content in contents.items():
        try:
            write_text(file, content)
        except OSError as error:
            raise InputError(f'"{file}" cannot be written: {error.strerror}.') from error
    return [html_file, markdown_file]


def escape(text: str) -> str:
    """Plain text for Markdown: nothing in it is markup or HTML, and it stays on its line."""
    text = re.sub(
        r"([\\`*_{}\[\]#~$|^])", r"\\\1", str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    text = re.sub(r"^(\s*)([-+=](?=[-+=\s]|$)|\d+[.)](?=\s|$))", lambda m: f"{m[1]}{m[2][:-1]}\\{m[2][-1]}", text)
    return re.sub(r"\s*\n\s*", " ⏎ ", text.replace("\r", "")).replace(r"\|", "&#124;")


def fence(text: str) -> str:
    """A code span that can hold backticks."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def _environment(*, autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _facts(model: dict[str, Any]) -> list[tuple[str, str]]:
    heads = model["num_heads"]
    order = model.get("table_order", 0)
    return [
        ("model", f"{model['name']} ({model['architecture']}, {model['base_parameters'] / 1e6:,.1f} M parameters)"),
        ("heads", f"{heads}, {model['overhead']:.1%} more parameters; ceiling {heads} tokens per step"),
        ("tables", f"co-occurrence up to order {order}" if order else "none"),
        ("computed", f"{model['dtype']} on {model['device']}, {model['threads']} thread{'s' * (model['threads'] != 1)}"),
        ("identity", model["identity"]),
    ]


def _lead(entry: dict[str, Any], quoted: bool) -> list[str]:
    said = [f"At most {entry['ceiling']} tokens per step. Baseline: {entry['baseline']}."]
    bench = (entry.get("settings") or {}).get("bench", "paper")
    counted = f"{len(entry['prompts'])} prompts x {entry['seeds']}"
    judge = f"Judge: {entry['judge']['name']}." if entry.get("judge") else "No judge."
    said.append(f'{judge} Benchmark: "{bench}", {counted}.')
    return [completion.WHY_MATCHED, *said] if quoted else said


def _perplexity_headlines(entry: dict[str, Any]) -> list[Headline]:
    """Where no judge says anything, the page begins with what the heads predict."""
    found = []
    for joint in entry.get("joint", [])[-1:]:
        found.append(
            Headline(f"{joint['ppl']:.1f}", f"perplexity of {joint['heads']} tokens jointly (PPL_1:{joint['heads']})", "")
        )
    for head in entry.get("heads", [])[:1]:
        error = head.get("se")
        bounds = None if error is None else (head["ppl"] - 1.96 * error, head["ppl"] + 1.96 * error)
        detail = "" if bounds is None else f"95 % interval {interval(bounds)}"
        found.append(Headline(f"{head['ppl']:.1f}", "perplexity of the next token (PPL_1)", detail))
    return found[::-1]


def _chosen(folder: Path, kind: str, entry: dict[str, Any], dial: float | None) -> list[list[dict[str, Any]]]:
    texts = samples.read(folder / f"{kind}.texts.jsonl", entry["model"]["identity"])
    return samples.choose(texts, len(entry.get("prompts", [])), dial)


def _texts(folder: Path, kind: str, records: Records, pieces: dict[str, Any]) -> list[Texts]:
    entry = records[kind]
    dial = (records.get("calibration", {}).get("chosen") or {}).get("eps_b")
    mine = {key.removeprefix(f"{kind}|"): value for key, value in pieces.items() if key.startswith(f"{kind}|")}
    return samples.blocks(_chosen(folder, kind, entry, dial), entry["prompts"], mine)
