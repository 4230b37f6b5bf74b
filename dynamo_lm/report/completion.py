"""The report's sections on generated text: same quality, the judge, decoding ablations, steps, diversity.

In: a completion record as `eval completion` writes it. Out: sections. A judge that failed its own check takes every win
rate with it: they are not shown, not even beside a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dynamo_lm.report import figures
from dynamo_lm.report.document import (
    DASH,
    Banner,
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
    within,
)
from dynamo_lm.report.samples import PAPER

Record = dict[str, Any]
WHY_MATCHED = (
    "The matched number is the one to quote: masking and thresholds act like a lower temperature, and a judge may prefer "
    "text merely because it is more cautious, so the base is cooled until its text is as repetitive as the candidate's."
)
VERSIONS = {"plain": "against the base as it is", "matched": "against the base at matched diversity"}
PAPER_ABLATION = "mask+Otsu+blur 0.98, mask+Otsu 0.96, mask 0.82, mask^0.5+Otsu+blur 0.77, Otsu+blur without mask 0.38"
HIDDEN = "Without a useful judge there is no win rate, and so no speed-up at the base's quality."


def useful(record: Record) -> bool:
    """Whether there was a judge and it passed its own check."""
    return bool(record["judge"] and record["judge"]["sanity"]["useful"])


def headlines(record: Record) -> list[Headline]:
    """The same-quality speed-up of the paper's method, matched first; none if the judge is useless."""
    if not useful(record):
        return []
    found = []
    same = record["methods"].get(PAPER, {}).get("same_quality", {})
    for version, small in (("matched", False), ("plain", True)):
        for measure, unit, name in (
            ("tokens_per_step", "", "tokens per step"),
            ("wall_clock", "x", "speed-up by the clock"),
        ):
            value = (same.get(version) or {}).get(measure)
            if value is None:
                continue
            bounds = value.get("interval")
            detail = f"95 % interval {interval(bounds)}" if bounds is not None else "too few samples for an interval"
            detail += "; extrapolated (theoretical)" if value.get("theoretical") else ""
            detail += "; capped at the ceiling" if value.get("capped") else ""
            shown = DASH if value["estimate"] is None else f"{value['estimate']:.2f}{unit}"
            if bounds is not None and bounds[0] <= 1 < bounds[1]:  # a large number would claim what is not known
                detail = (
                    f"regression {shown}, but its 95 % interval holds 1: too few samples to tell"
                    + detail.partition(interval(bounds))[2]
                )
                shown = f"{bounds[0]:.2f} to {bounds[1]:.2f}{unit}"
            found.append(Headline(shown, f"{name}, {VERSIONS[version]}", detail, small))
    return found


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
        facts += [
            ("new tokens", f"at most {record['max_new_tokens']}"),
            ("judge", record["judge"]["name"] if record["judge"] else "none"),
        ]
    return Source(record["command"], facts)


def sections(record: Record, *, prefix: str = "", bench: str = "") -> list[Section]:
    """Everything on one completion run; `prefix` keeps ids apart, `bench` names a prompt set other than the paper's ten."""
    judged, on, short = useful(record), f" on {bench}" if bench else "", source(record, short=True)
    made = [
        Section(f"{prefix}quality", f"Speed at the base model's quality{on}", _quality(record, prefix), source(record)),
        Section(f"{prefix}decoding", f"Decoding ablations{on}", _ablations(record, prefix), short),
        Section(f"{prefix}steps", f"How many tokens a step gives{on}", _steps(record, prefix), short),
        Section(f"{prefix}diversity", f"Likelihood and diversity{on}", _diversity(record, prefix), short),
    ]
    if not judged:
        made[0].blocks[:0] = banners(record)
    return [section for section in made if section.blocks]


def _quality(record: Record, prefix: str) -> list[Any]:
    blocks: list[Any] = []
    method = PAPER if PAPER in record["methods"] else next(iter(record["methods"]), None)
    if useful(record) and method is not None:
        entry = record["methods"][method]
        pictures = [_win_rate(record, method, version, f"{prefix}win-{version}") for version in VERSIONS]
        caption = (
            f"Win rate against speed-up for {method}. Every point is one eps_b, with its 95 % interval; the line is the "
            "regression with its bootstrap band. On the horizontal line wins equal losses; the dotted vertical line marks "
            f"the same-quality speed-up, the solid one the ceiling of {record['ceiling']} tokens."
        )
        blocks.append(Gallery(pictures, caption, _win_table(entry["points"], method)))
        blocks.append(_same_quality_table(record))
        blocks.append(Prose(WHY_MATCHED))
    return blocks + _judge(record)


def _win_rate(record: Record, method: str, version: str, name: str, *, small: bool = False) -> Figure:
    entry = record["methods"][method]
    same = entry["same_quality"].get(version) or {}
    band = same.get("band")
    crossing = (same.get("tokens_per_step") or {}).get("estimate")
    points = [
        figures.Point(
            p["tokens_per_step"],
            p[version]["win_rate"],
            *_bounds(p[version].get("interval")),
            _dial(p["eps_b"]),
        )
        for p in entry["points"]
        if p.get(version) and p[version]["win_rate"] is not None
    ]
    svg = partial(
        figures.win_rate,
        points,
        figures.Band(band["x"], band["win_rate"], band["low"], band["high"]) if band else None,
        crossing,
        method=method,
        ceiling=record["ceiling"],
        small=small,
    )
    ends = f", from {points[0].y:.2f} at {points[0].x:.2f} to {points[-1].y:.2f} at {points[-1].x:.2f}" if points else ""
    label = f"Win rate of {method} {VERSIONS[version]} over tokens per step{ends}; same quality at {number(crossing)}."
    return Figure(name, method if small else VERSIONS[version][0].upper() + VERSIONS[version][1:], label, svg)


def _win_table(points: list[Record], method: str) -> Table:
    columns = ["eps_b", "tokens per step", "wins / ties / losses, plain", "win rate, plain", "wins / ties / losses, matched"]
    columns += ["win rate, matched", "base's temperature"]
    rows = []
    for p in points:
        row = [_dial(p["eps_b"]), within(p["tokens_per_step"], p.get("tokens_per_step_interval"))]
        for version in VERSIONS:
            verdicts = p.get(version) or {}
            row.append(" / ".join(f"{verdicts[key]:g}" for key in ("wins", "ties", "losses")) if verdicts else DASH)
            row.append(_rate(p, version))
        row.append(number((p.get("matched") or {}).get("temperature")))
        rows.append(row)
    return Table(f"The points of {method}", columns, rows, folded=True)


def _same_quality_table(record: Record) -> Table:
    columns = ["method", "tokens per step, matched", "wall clock, matched", "tokens per step, plain", "wall clock, plain"]
    rows, notes = [], []
    for method, entry in record["methods"].items():
        row = [method]
        for version in ("matched", "plain"):
            same = entry["same_quality"].get(version) or {}
            for measure in ("tokens_per_step", "wall_clock"):
                value = same.get(measure) or {"estimate": None}
                mark = "*" * bool(value.get("theoretical")) + "†" * bool(value.get("capped"))
                row.append(within(value["estimate"], value.get("interval")) + mark)
            if same.get("note"):
                notes.append(_sentence(f"{method}, {version}: {same['note']}"))
        rows.append(row)
    marks = f"* theoretical: the regression was extrapolated to win rate 1. † capped at the ceiling of {record['ceiling']}."
    note = " ".join([marks, *notes])
    return Table("Same-quality speed-up (win rate 1) with 95 % intervals", columns, rows, note)


def _judge(record: Record) -> list[Any]:
    judge = record["judge"]
    if judge is None:
        return [Prose("No judge was asked: speeds and diversity only. Name one with --reference or --endpoint.")]
    sanity, rows = judge["sanity"], []
    for key, name in (("shuffled", "base against its own words shuffled"), ("same", "base against the base, another seed")):
        check = sanity.get(key)
        if check:
            verdicts = " / ".join(f"{check[part]:g}" for part in ("wins", "ties", "losses"))
            bounds = check.get("interval")
            share = percent(check.get("share"))
            share += f" ({bounds[0]:.0%} to {bounds[1]:.0%})" if bounds else ""
            rows.append([name, verdicts, share, "near 100 %" if key == "shuffled" else "near 50 %"])
    verdict = "It passed its own check." if useful(record) else f"It failed its own check: {_sentence(sanity['reason'])}"
    blocks: list[Any] = [Prose(f"The judge is {judge['name']}. {_sentence(judge['caveat'])} {verdict}")]
    if rows:
        columns = ["the judge's check", "wins / ties / losses", "wins (95 % interval)", "should be"]
        blocks.append(Table("Does the judge know good text from bad?", columns, rows))
    return blocks


def _ablations(record: Record, prefix: str) -> list[Any]:
    judged = useful(record)
    blocks: list[Any] = []
    methods = record["methods"]
    if judged and len(methods) > 1:
        panels = [
            _win_rate(record, method, "matched", f"{prefix}win-{position}", small=True)
            for position, method in enumerate(methods)
        ]
        caption = "Win rate (wins to losses against the base at matched diversity) over tokens per step, method by method."
        blocks.append(Gallery(panels, caption, columns=3))
        order = sorted(
            (
                (entry["same_quality"]["matched"]["tokens_per_step"]["estimate"], name)
                for name, entry in methods.items()
                if ((entry["same_quality"].get("matched") or {}).get("tokens_per_step") or {}).get("estimate") is not None
            ),
            reverse=True,
        )
        if len(order) > 1:
            ranking = ", ".join(f"{name} {value:.2f}" for value, name in order)
            blocks.append(
                Prose(
                    f"In order of their matched same-quality speed-up: {ranking}. The paper's win rates at eps_b 0.5 (a "
                    f"7.3B chat model, near 2.5 tokens per step): {PAPER_ABLATION}."
                )
            )
    if not methods:
        return []
    columns = ["method", "eps_b", "tokens per step", "wall clock (spread)"]
    columns += ["win rate, matched", "win rate, plain"] * judged + ["log-likelihood / byte", "regret / token"]
    rows = []
    for method, entry in methods.items():
        for p in entry["points"]:
            speed = p["speed_up"]
            row = [method, _dial(p["eps_b"]), within(p["tokens_per_step"], p.get("tokens_per_step_interval"))]
            spread = f" ({speed['low']:.2f}-{speed['high']:.2f})" if speed["low"] is not None else ""  # too few prompts
            row.append(f"{speed['median']:.2f}x{spread}")
            row += [_rate(p, "matched"), _rate(p, "plain")] * judged
            rows.append([*row, number(p["log_likelihood_per_byte"], 3), number(p["regret"], 3)])
    note = "" if judged else HIDDEN
    return [*blocks, Table("Every method at every eps_b", columns, rows, note, folded=len(rows) > 40)]


def _steps(record: Record, prefix: str) -> list[Any]:
    panels: list[Figure] = []
    rows: list[list[str]] = []
    for method, entry in record["methods"].items():
        points = [p for p in entry["points"] if p["eps_b"] is not None and p.get("shares")]
        rows += [[method, _dial(p["eps_b"]), *map(percent, p["shares"])] for p in entry["points"] if p.get("shares")]
        if not points or method not in (PAPER, "Otsu+blur"):
            continue
        label = (
            f"Stacked bars for {method}: share of one-token steps from {percent(points[0]['shares'][0])} at eps_b "
            f"{points[0]['eps_b']:g} to {percent(points[-1]['shares'][0])} at {points[-1]['eps_b']:g}."
        )
        svg = partial(figures.shares, [f"{p['eps_b']:g}" for p in points], [p["shares"] for p in points])
        panels.append(Figure(f"{prefix}shares-{len(panels)}", method, label, svg))
    if not rows:
        return []
    columns = ["method", "eps_b", *(f"{size}" for size in range(1, record["ceiling"] + 1))]
    width = len(columns)
    table = Table(
        "Share of steps by tokens given", columns, [row + [DASH] * (width - len(row)) for row in rows], folded=True
    )
    caption = "Share of the steps that gave one token, two, and so on, while writing; the fewer the dial demands, the more."
    return [Gallery(panels, caption, table)] if panels else [table]


def _diversity(record: Record, prefix: str) -> list[Any]:
    ladder = sorted(record.get("ladder") or [], key=lambda rung: rung["temperature"])
    columns = ["arm", "log-likelihood / byte", "score", "distinct-1", "distinct-2", "distinct-3", "pooled distinct-2"]
    columns += ["self-BLEU", "repetition", "MAUVE"]
    kept = ("distinct_1", "distinct_2", "distinct_3", "pooled_distinct_2", "self_bleu", "repetition", "mauve")

    def row(name: str, entry: Record) -> list[str]:
        diversity = entry.get("diversity") or {}
        score = number(entry.get("score"), 1) if useful(record) else DASH
        measures = [number(diversity.get(key), 3) for key in kept]
        return [name, number(entry["log_likelihood_per_byte"], 3), score, *measures]

    rows = [row(f"base, temperature {rung['temperature']:g}", rung) for rung in ladder]
    for method, entry in record["methods"].items():
        rows += [row(method if p["eps_b"] is None else f"{method}, eps_b {p['eps_b']:g}", p) for p in entry["points"]]
    if not rows:
        return []
    empty = [at for at in range(1, len(columns)) if all(line[at] == DASH for line in rows)]
    columns = [name for at, name in enumerate(columns) if at not in empty]
    rows = [[cell for at, cell in enumerate(line) if at not in empty] for line in rows]
    table = Table(
        "Diversity beside every score",
        columns,
        rows,
        "Distinct-n is higher, self-BLEU and repetition lower, in livelier text.",
        folded=len(rows) > 40,
    )

    def at(entry: Record, label: str = "") -> figures.Point:
        return figures.Point(entry["diversity"]["pooled_distinct_2"], entry["log_likelihood_per_byte"], label=label)

    def placed(entry: Record) -> bool:
        diversity = (entry.get("diversity") or {}).get("pooled_distinct_2")
        return diversity is not None and entry.get("log_likelihood_per_byte") is not None

    usable = [rung for rung in ladder if placed(rung)]
    if not usable:
        return [table]
    clouds = [(method, [at(p) for p in entry["points"] if placed(p)]) for method, entry in record["methods"].items()]
    picture = Figure(
        f"{prefix}frontier",
        "Likelihood against diversity",
        "Log-likelihood per byte over pooled distinct bigrams: the base by temperature as a line, the methods as points.",
        partial(
            figures.frontier,
            [at(rung, f"{rung['temperature']:g}") for rung in usable],
            [cloud for cloud in clouds if cloud[1]],
            x_label="distinct bigrams in all completions of a prompt",
            y_label="log-likelihood, nats per byte",
        ),
    )
    caption = (
        "The line is what the base can do by temperature alone. A method above it writes likelier text at the same "
        "diversity; one on it has only lowered the temperature; one below it pays for its speed."
    )
    return [Gallery([picture], caption), table]


def _rate(point: Record, version: str) -> str:
    verdicts = point.get(version) or {}
    return within(verdicts.get("win_rate"), verdicts.get("interval"))


def _bounds(interval: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval[0], interval[1])


def _dial(eps_b: float | None) -> str:
    return DASH if eps_b is None else f"{eps_b:g}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
