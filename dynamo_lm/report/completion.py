"""The report's sections on generated text: same quality, the judge, decoding ablations, steps, diversity.

In: a completion record as `eval completion` writes it. Out: sections. A judge that failed its own check takes every win
rate with it: they are not shown, not even beside a warning.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dynamo_lm.report import figures
from dynamo_lm.report.document import (
    DASH,
    Banner,
    Block,
    Columns,
    Figure,
    Gallery,
    Headline,
    Prose,
    Section,
    Source,
    Table,
    interval,
    number,
    percent,
    share,
    within,
)
from dynamo_lm.report.samples import PAPER

Record = dict[str, Any]
WHY_MATCHED = (
    "The matched number is the one to quote: masking and thresholds act like a lower temperature, and a judge may prefer "
    "text merely because it is more cautious, so the base is cooled until its text is as repetitive as the candidate's."
)
VERSIONS = {"plain": "against the base as it is", "matched": "against the base at matched diversity"}
MEASURES = {"tokens_per_step": ("tokens per step", ""), "wall_clock": ("speed-up by the clock", "x")}  # name, unit
CHECKS = {
    "shuffled": ("base against its own words shuffled", "near 100 %"),
    "same": ("base against the base, another seed", "near 50 %"),
}
PAPER_ABLATION = "mask+Otsu+blur 0.98, mask+Otsu 0.96, mask 0.82, mask^0.5+Otsu+blur 0.77, Otsu+blur without mask 0.38"
HIDDEN = "Without a useful judge there is no win rate, and so no speed-up at the base's quality."


def useful(record: Record) -> bool:
    """Whether there was a judge and it passed its own check."""
    return bool(record["judge"] and record["judge"]["sanity"]["useful"])


def headlines(record: Record) -> list[Headline]:
    """The same-quality speed-up of the paper's method, matched first; none if the judge is useless."""
    if not useful(record):
        return []
    same = record["methods"].get(PAPER, {}).get("same_quality", {})
    return [
        _headline(value, f"{name}, {VERSIONS[version]}", unit, small=version == "plain")
        for version in ("matched", "plain")
        for measure, (name, unit) in MEASURES.items()
        if (value := (same.get(version) or {}).get(measure)) is not None
    ]


def _headline(value: Record, name: str, unit: str, *, small: bool) -> Headline:
    bounds = value.get("interval")
    marks = "; extrapolated (theoretical)" * bool(value.get("theoretical"))
    marks += "; capped at the ceiling" * bool(value.get("capped"))
    shown = DASH if value["estimate"] is None else f"{value['estimate']:.2f}{unit}"
    if bounds is None:
        return Headline(shown, name, f"too few samples for an interval{marks}", small)
    if bounds[0] <= 1 < bounds[1]:  # the estimate alone would claim what is not known
        detail = f"regression {shown}, but its 95 % interval holds 1: too few samples to tell{marks}"
        return Headline(f"{interval(bounds)}{unit}", name, detail, small)
    return Headline(shown, name, f"95 % interval {interval(bounds)}{marks}", small)


def banners(record: Record) -> list[Banner]:
    """What a reader must see before any number."""
    judge = record["judge"]
    if judge is None or useful(record):
        return []
    text = f"The judge {judge['name']} failed its own check: {_sentence(judge['sanity'].get('reason') or 'no reason given')}"
    return [Banner("This judge is useless here", f"{text} {HIDDEN}")]


def source(record: Record, *, short: bool = False) -> Source:
    """Command, seed, baseline and ceiling of a completion run; not `short`: also how large it was, and who judged."""
    facts = [("seed", str(record["seed"])), ("baseline", record["baseline"])]
    facts.append(("ceiling", f"{record['ceiling']} tokens per step"))
    if not short:
        facts.append(("prompts x seeds", f"{len(record['prompts'])} x {record['seeds']}"))
        facts.append(("new tokens", f"at most {record['max_new_tokens']}"))
        facts.append(("judge", record["judge"]["name"] if record["judge"] else "none"))
    return Source(record["command"], facts)


def sections(record: Record, *, prefix: str = "", bench: str = "") -> list[Section]:
    """Everything on one completion run; `prefix` keeps ids apart, `bench` names a prompt set other than the paper's ten."""
    on, short = f" on {bench}" if bench else "", source(record, short=True)
    quality = [*banners(record), *_quality(record, prefix)]
    made = [
        Section(f"{prefix}quality", f"Speed at the base model's quality{on}", quality, source(record)),
        Section(f"{prefix}decoding", f"Decoding ablations{on}", _ablations(record, prefix), short),
        Section(f"{prefix}steps", f"How many tokens a step gives{on}", _steps(record, prefix), short),
        Section(f"{prefix}diversity", f"Likelihood and diversity{on}", _diversity(record, prefix), short),
    ]
    return [section for section in made if section.blocks]


def _quality(record: Record, prefix: str) -> list[Block]:
    method = PAPER if PAPER in record["methods"] else next(iter(record["methods"]), None)
    if not useful(record) or method is None:
        return _judge(record)
    pictures = [_win_rate(record, method, version, f"{prefix}win-{version}") for version in VERSIONS]
    caption = (
        f"Win rate against speed-up for {method}. Every point is one eps_b, with its 95 % interval; the line is the "
        "regression with its bootstrap band. On the horizontal line wins equal losses; the dotted vertical line marks "
        f"the same-quality speed-up, the solid one the ceiling of {record['ceiling']} tokens."
    )
    columns: Columns = {"eps_b": _eps_b, "tokens per step": _tokens_per_step}
    for version in VERSIONS:
        columns[f"wins / ties / losses, {version}"] = partial(_version_verdicts, version=version)
        columns[f"win rate, {version}"] = partial(_rate, version=version)
    columns["base's temperature"] = lambda p: number((p.get("matched") or {}).get("temperature"))
    numbers = Table.of(f"The points of {method}", columns, record["methods"][method]["points"], folded=True)
    return [Gallery(pictures, caption, numbers), _same_quality_table(record), Prose(WHY_MATCHED), *_judge(record)]


def _win_rate(record: Record, method: str, version: str, name: str, *, small: bool = False) -> Figure:
    entry = record["methods"][method]
    same = entry["same_quality"].get(version) or {}
    band = same.get("band")
    regression = zip(*(band[key] for key in ("x", "win_rate", "low", "high")), strict=True) if band else ()
    crossing = (same.get("tokens_per_step") or {}).get("estimate")
    points = [
        figures.Point(p["tokens_per_step"], p[version]["win_rate"], low, high, _eps_b(p))
        for p in entry["points"]
        if p.get(version) and p[version]["win_rate"] is not None
        for low, high in [p[version].get("interval") or (None, None)]
    ]
    options: dict[str, Any] = {"method": method, "ceiling": record["ceiling"], "small": small}
    svg = partial(figures.win_rate, points, [figures.Point(*values) for values in regression], crossing, **options)
    ends = f", from {points[0].y:.2f} at {points[0].x:.2f} to {points[-1].y:.2f} at {points[-1].x:.2f}" if points else ""
    label = f"Win rate of {method} {VERSIONS[version]} over tokens per step{ends}; same quality at {number(crossing)}."
    return Figure(name, method if small else _capital(VERSIONS[version]), label, svg)


def _same_quality_table(record: Record) -> Table:
    def cell(row: tuple[str, Record], version: str, measure: str) -> str:
        value = (row[1].get(version) or {}).get(measure) or {"estimate": None}
        mark = "*" * bool(value.get("theoretical")) + "†" * bool(value.get("capped"))
        return within(value["estimate"], value.get("interval")) + mark

    rows = [(method, entry["same_quality"]) for method, entry in record["methods"].items()]
    columns: Columns = {"method": lambda row: row[0]}
    for version in ("matched", "plain"):
        for measure in MEASURES:
            columns[f"{measure.replace('_', ' ')}, {version}"] = partial(cell, version=version, measure=measure)
    notes = [
        f"* theoretical: the regression was extrapolated to win rate 1. † capped at the ceiling of {record['ceiling']}.",
        *(
            _sentence(f"{method}, {version}: {same[version]['note']}")
            for method, same in rows
            for version in ("matched", "plain")
            if (same.get(version) or {}).get("note")
        ),
    ]
    return Table.of("Same-quality speed-up (win rate 1) with 95 % intervals", columns, rows, note=" ".join(notes))


def _judge(record: Record) -> list[Block]:
    judge = record["judge"]
    if judge is None:
        return [Prose("No judge was used: speeds and diversity only. Name one with --reference or --endpoint.")]
    sanity = judge["sanity"]

    def wins(key: str) -> str:
        bounds = sanity[key].get("interval")
        return percent(sanity[key].get("share")) + (f" ({bounds[0]:.0%} to {bounds[1]:.0%})" if bounds else "")

    verdict = "It passed its own check." if useful(record) else f"It failed its own check: {_sentence(sanity['reason'])}"
    blocks: list[Block] = [Prose(f"The judge is {judge['name']}. {_sentence(judge['caveat'])} {verdict}")]
    columns: Columns = {
        "the judge's check": lambda key: CHECKS[key][0],
        "wins / ties / losses": lambda key: _verdicts(sanity[key]),
        "wins (95 % interval)": wins,
        "should be": lambda key: CHECKS[key][1],
    }
    checks = Table.of("Does the judge know good text from bad?", columns, [key for key in CHECKS if sanity.get(key)])
    return [*blocks, checks] if checks.rows else blocks


def _ablations(record: Record, prefix: str) -> list[Block]:
    judged, methods = useful(record), record["methods"]
    if not methods:
        return []
    blocks: list[Block] = []
    if judged and len(methods) > 1:
        panels = [_win_rate(record, name, "matched", f"{prefix}win-{at}", small=True) for at, name in enumerate(methods)]
        caption = "Win rate (wins to losses against the base at matched diversity) over tokens per step, method by method."
        blocks.append(Gallery(panels, caption, columns=3))
        same = {name: (entry["same_quality"].get("matched") or {}).get("tokens_per_step") for name, entry in methods.items()}
        order = sorted(
            ((value["estimate"], name) for name, value in same.items() if value and value.get("estimate") is not None),
            reverse=True,
        )
        if len(order) > 1:
            ranking = ", ".join(f"{name} {value:.2f}" for value, name in order)
            paper = f"(a 7.3B chat model, near 2.5 tokens per step): {PAPER_ABLATION}."
            text = f"In order of their matched same-quality speed-up: {ranking}. The paper's win rates at eps_b 0.5 {paper}"
            blocks.append(Prose(text))

    def wall_clock(p: Record) -> str:
        speed = p["speed_up"]
        bounds = f" ({speed['low']:.2f}-{speed['high']:.2f})" if speed["low"] is not None else ""  # too few prompts
        return f"{speed['median']:.2f}x{bounds}"

    columns: Columns = {
        "method": lambda p: p["method"],
        "eps_b": _eps_b,
        "tokens per step": _tokens_per_step,
        "wall clock (spread)": wall_clock,
        **({f"win rate, {version}": partial(_rate, version=version) for version in ("matched", "plain")} if judged else {}),
        "log-likelihood / byte": lambda p: number(p["log_likelihood_per_byte"], 3),
        "regret / token": lambda p: number(p["regret"], 3),
    }
    rows, note = _points(record), "" if judged else HIDDEN
    return [*blocks, Table.of("Every method at every eps_b", columns, rows, note=note, folded=len(rows) > 40)]


def _steps(record: Record, prefix: str) -> list[Block]:
    panels: list[Figure] = []
    for method, entry in record["methods"].items():
        points = [p for p in entry["points"] if p["eps_b"] is not None and p.get("shares")]
        if not points or method not in (PAPER, "Otsu+blur"):
            continue
        label = (
            f"Stacked bars for {method}: share of one-token steps from {percent(points[0]['shares'][0])} at eps_b "
            f"{points[0]['eps_b']:g} to {percent(points[-1]['shares'][0])} at {points[-1]['eps_b']:g}."
        )
        svg = partial(figures.shares, [f"{p['eps_b']:g}" for p in points], [p["shares"] for p in points])
        panels.append(Figure(f"{prefix}shares-{len(panels)}", method, label, svg))
    columns: Columns = {"method": lambda p: p["method"], "eps_b": _eps_b}
    for size in range(1, record["ceiling"] + 1):
        columns[f"{size}"] = lambda p, size=size: share(p["shares"], size)
    table = Table.of("Share of steps by tokens given", columns, [p for p in _points(record) if p.get("shares")], folded=True)
    caption = "Share of the steps that gave one token, two, and so on, while writing: the lower eps_b, the more tokens."
    return [Gallery(panels, caption, table)] if panels else [table] if table.rows else []


def _diversity(record: Record, prefix: str) -> list[Block]:
    ladder = sorted(record.get("ladder") or [], key=lambda rung: rung["temperature"])
    rows = [rung | {"arm": f"base, temperature {rung['temperature']:g}"} for rung in ladder]
    for p in _points(record):
        rows.append(p | {"arm": p["method"] if p["eps_b"] is None else f"{p['method']}, eps_b {p['eps_b']:g}"})
    if not rows:
        return []
    judged = useful(record)
    columns: Columns = {
        "arm": lambda entry: entry["arm"],
        "log-likelihood / byte": lambda entry: number(entry["log_likelihood_per_byte"], 3),
        "score": lambda entry: number(entry.get("score"), 1) if judged else DASH,
    }
    for name in ("distinct-1", "distinct-2", "distinct-3", "pooled distinct-2", "self-BLEU", "repetition", "MAUVE"):
        key = name.lower().replace("-", "_").replace(" ", "_")
        columns[name] = lambda entry, key=key: number((entry.get("diversity") or {}).get(key), 3)
    columns = {name: cell for name, cell in columns.items() if any(cell(row) != DASH for row in rows)}
    note = "Distinct-n is higher, self-BLEU and repetition lower, in livelier text."
    table = Table.of("Diversity beside every score", columns, rows, note=note, folded=len(rows) > 40)

    def cloud(entries: list[Record], label: str = "") -> list[figures.Point]:
        return [
            figures.Point(diversity, entry["log_likelihood_per_byte"], label=f"{entry[label]:g}" if label else "")
            for entry in entries
            if (diversity := (entry.get("diversity") or {}).get("pooled_distinct_2")) is not None
            and entry.get("log_likelihood_per_byte") is not None
        ]

    path = cloud(ladder, "temperature")
    if not path:
        return [table]
    clouds = [(method, points) for method, entry in record["methods"].items() if (points := cloud(entry["points"]))]
    labels = {"x_label": "distinct bigrams in all completions of a prompt", "y_label": "log-likelihood, nats per byte"}
    label = "Log-likelihood per byte over pooled distinct bigrams: the base by temperature as a line, the methods as points."
    svg = partial(figures.frontier, path, clouds, **labels)
    caption = (
        "The line is what the base can do by temperature alone. A method above it writes likelier text at the same "
        "diversity; one on it has only lowered the temperature; one below it pays for its speed."
    )
    return [Gallery([Figure(f"{prefix}frontier", "Likelihood against diversity", label, svg)], caption), table]


def _points(record: Record) -> list[Record]:
    """Every point of every method, with the method's name."""
    return [p | {"method": method} for method, entry in record["methods"].items() for p in entry["points"]]


def _tokens_per_step(point: Record) -> str:
    return within(point["tokens_per_step"], point.get("tokens_per_step_interval"))


def _verdicts(entry: Record) -> str:
    return " / ".join(f"{entry[key]:g}" for key in ("wins", "ties", "losses"))


def _version_verdicts(point: Record, version: str) -> str:
    return _verdicts(point[version]) if point.get(version) else DASH


def _rate(point: Record, version: str) -> str:
    entry = point.get(version) or {}
    return within(entry.get("win_rate"), entry.get("interval"))


def _eps_b(point: Record) -> str:
    return DASH if point["eps_b"] is None else f"{point['eps_b']:g}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
