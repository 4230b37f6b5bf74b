"""The report's sections on perplexity, calibration, benchmarks, training variants and the joint distribution.

In: records as the `eval` commands write them. Out: sections. `completion.py` does the same for generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dynamo_lm.decoding.joint_heatmap import HeatMap
from dynamo_lm.report import figures
from dynamo_lm.report.document import (
    DASH,
    Block,
    Columns,
    Figure,
    Gallery,
    Prose,
    Section,
    Source,
    Table,
    interval,
    number,
    share,
    spread,
)

Record = dict[str, Any]
STAGES = (
    ("plain", "Plain product", "heads 1 and 2 as if they were independent"),
    ("masked", "Masked", "times the co-occurrence weight: pairs never seen are gone"),
    ("blurred", "Blurred", "smoothed over neighbouring ranks: what Otsu's threshold judges"),
    ("thresholded", "Thresholded", "the masked entries that Otsu's threshold lets stand"),
)
CRITERIA = {
    "ppl": "PPL_d ratio to one token per step",
    "regret": "regret, nats per token",
    "win-rate": "win rate against the base",
}


def perplexity(record: Record) -> Section:
    """The paper's Table 2 and Fig. 15."""
    rows = [[f"PPL_{h['head']}", spread(h["ppl"], h.get("se")), DASH, f"{h['tokens']:,}"] for h in record.get("heads") or []]
    for joint in record.get("joint") or []:
        if joint["heads"] > 1:  # PPL_1:1 is PPL_1
            masked = spread(joint.get("masked_ppl"), joint.get("masked_se"))
            rows.append([f"PPL_1:{joint['heads']}", spread(joint["ppl"], joint.get("se")), masked, ""])
    base = record.get("base") or {}
    if base.get("ppl") is not None:
        rows.append(["PPL_1 of the base model", number(base["ppl"]), DASH, ""])
    note = "± one standard error by document. PPL_i: head i's perplexity i tokens ahead; PPL_1:m: of m tokens jointly."
    columns = ["", "product of heads", "with co-occurrence mask", "tokens"]
    blocks: list[Block] = [Table("Multi-token perplexity", columns, rows, note)] if rows else []
    text = record["text"]
    facts = [
        ("text", f"{', '.join(text['sources'])}: {text['documents']:,} documents, {text['tokens']:,} tokens"),
        ("window, stride", f"{record['window']:,}, {record['stride']:,} tokens"),
        ("baseline", "one token per step (PPL_d at eps_b 1 is PPL_1)"),
        ("ceiling", f"{record['ceiling']} tokens per step"),
    ]
    if record.get("dynamic"):
        blocks += _dynamic(record["dynamic"], record["ceiling"])
    return Section("perplexity", "Perplexity", blocks, _source(record, facts))


def _dynamic(dynamic: list[Record], ceiling: int) -> list[Block]:
    def masked(row: Record) -> bool:
        return bool(row.get("masked", True))

    rows = sorted(dynamic, key=lambda row: (not masked(row), row["eps_b"]))
    with_mask, without = [row for row in rows if masked(row)], [row for row in rows if not masked(row)]
    lines = [  # the same steps, scored in two ways
        (name, _curve(scored, "eps_b", "ppl", "se"))
        for name, scored in (("scored with the mask", with_mask), ("scored by the product", without))
        if scored
    ]
    steps = with_mask or without
    points = lines[0][1]
    ends = f"from {points[0].y:.1f} at eps_b {points[0].x:g} to {points[-1].y:.1f} at {points[-1].x:g}"
    curves = partial(figures.curves, lines, x_label="eps_b", y_label="PPL_d (lower is better)", log=True)
    pictures = [Figure("dynamic-ppl", "Dynamic perplexity", f"PPL_d over eps_b, {ends}.", curves)]
    speeds, level = [("", _curve(steps, "eps_b", "tokens_per_step"))], (ceiling, f"ceiling {ceiling}")
    curves = partial(figures.curves, speeds, x_label="eps_b", y_label="tokens per step", level=level)
    pictures.append(Figure("dynamic-speed", "Speed-up", f"Tokens per step over eps_b, at most {ceiling}.", curves))
    columns: Columns = {
        "eps_b": lambda row: f"{row['eps_b']:g}",
        "scored with the mask": lambda row: "with the mask" if masked(row) else "by the product",
        "PPL_d": lambda row: spread(row["ppl"], row.get("se")),
        "tokens per step": lambda row: number(row["tokens_per_step"]),
    }
    for size in range(1, ceiling + 1):
        columns[f"{size}-token steps"] = lambda row, size=size: share(row.get("shares"), size)
    caption = (
        "Dynamic perplexity and tokens per step as eps_b rises from fastest (0) to one token at a time (1): the text is "
        "walked with the generator's own decisions, and the true tokens of each step are scored by the product of heads or "
        "with the co-occurrence mask. Bars: 95 % intervals."
    )
    blocks: list[Block] = [Gallery(pictures, caption, Table.of("Dynamic perplexity", columns, rows, folded=True))]
    shown = [row for row in steps if row.get("shares")]
    if shown:
        svg = partial(figures.shares, [f"{row['eps_b']:g}" for row in shown], [row["shares"] for row in shown])
        label = f"Share of steps of 1 to {ceiling} tokens on held-out text, for every eps_b."
        panel = Figure("walk-shares", "Steps on held-out text", label, svg)
        blocks.append(Gallery([panel], "Share of the steps of that walk that covered one token, two, and so on."))
    return blocks


def calibration(record: Record) -> Section:
    """The curve that `calibrate` chose from, and its choice."""
    criterion, curve = record["criterion"], sorted(record["curve"], key=lambda row: row["eps_b"])
    name, limit = criterion["name"], criterion["limit"]
    what = CRITERIA.get(name, name)
    chosen = record.get("chosen") or {}
    eps_b = chosen.get("eps_b")
    text = f"No eps_b passes the criterion {name} (limit {limit:g})."
    if eps_b is not None:
        text = f"By the criterion {name} ({what}; limit {limit:g}) the choice is eps_b {eps_b:g}, which "
        text += f"gives {chosen['tokens_per_step']:.2f} tokens per step."
    lines = [(name, [figures.Point(row["eps_b"], row["value"], row.get("low"), row.get("high")) for row in curve])]
    level = (limit, f"limit {limit:g}")
    svg = partial(figures.curves, lines, x_label="eps_b", y_label=what, level=level, chosen=eps_b)
    columns: Columns = {
        "eps_b": lambda row: f"{row['eps_b']:g}",
        "tokens per step": lambda row: number(row["tokens_per_step"]),
        "value": lambda row: number(row["value"], 3),
        "95 % interval": lambda row: (
            DASH if None in (row.get("low"), row.get("high")) else interval((row["low"], row["high"]), 3)
        ),
        "passes": lambda row: ("yes" if row["passes"] else "no") + ", chosen" * (row["eps_b"] == eps_b),
    }
    table = Table.of("The calibration curve", columns, curve, folded=len(curve) > 6)
    picture = Gallery(
        [Figure("calibration", f"Criterion: {name}", text, svg)], f"{what[0].upper()}{what[1:]} over eps_b.", table
    )
    facts = [("criterion", f"{name}, limit {limit:g}")]
    return Section("calibration", "The calibrated eps_b", [Prose(text), picture], _source(record, facts))


def nlu(record: Record) -> Section:
    """Benchmarks, base beside DynaMo."""
    rows = []
    for task, entry in record.get("tasks", {}).items():
        for metric, mine in entry["dynamo"].items():
            base = (entry.get("base") or {}).get(metric) or {"value": None, "stderr": None}  # none: trained with its heads
            change = DASH if mine["value"] is None or base["value"] is None else f"{mine['value'] - base['value']:+.3f}"
            values = [spread(value["value"], value.get("stderr"), 3) for value in (base, mine)]
            rows.append([task, metric, *values, change, f"{entry['samples']:,}" if entry.get("samples") else DASH])
    blocks: list[Block] = []
    if rows:
        note = "± the harness's standard errors. DynaMo answers with head 1."
        names = ["task", "metric", "base", "DynaMo", "change", "samples"]
        blocks.append(Table("Natural-language understanding", names, rows, note))
    generation = record.get("generation") or {}
    columns: Columns = {
        "task": lambda run: run["task"],
        "arm": lambda run: run["arm"],
        "accuracy": lambda run: spread(run["accuracy"], run.get("stderr"), 3),
        "tokens per step": lambda run: number(run.get("tokens_per_step")),
        "wall clock": lambda run: DASH if run.get("speed_up") is None else f"{run['speed_up']:.2f}x",
        "ceiling": lambda run: number(run.get("ceiling"), 0),
    }
    runs = [run | {"task": task} for task, entries in generation.items() for run in entries]
    if runs:
        note = "Against one token per step in the same loop."
        numbers = Table.of("Answers that are written out", columns, runs, note=note)
        lines = [(task, _accuracies(entries)) for task, entries in generation.items()]
        svg = partial(figures.curves, lines, x_label="speed-up (wall clock)", y_label="accuracy")
        label = "Accuracy of every task over the speed-up of its arms."
        picture = Figure("accuracy", "Accuracy against speed-up", label, svg)
        blocks.append(Gallery([picture], "Answers that are written out. Bars: 95 % intervals.", numbers))
    return Section("nlu", "Benchmarks", blocks, _source(record))


def _accuracies(runs: list[Record]) -> list[figures.Point]:
    """One task's arms by rising speed-up; the one-token arm is its own baseline."""
    arms = sorted(({**run, "speed_up": run.get("speed_up") or 1.0} for run in runs), key=lambda run: run["speed_up"])
    return [
        figures.Point(p.x, p.y, max(0.0, p.low or 0.0), min(1.0, p.high or 0.0))
        for p in _curve(arms, "speed_up", "accuracy", "stderr")
    ]


def ablation(record: Record) -> Section:
    """The paper's Table 10: variants of heads, trained alike."""
    variants = [row | {"joint": {j["heads"]: j for j in row.get("joint") or []}} for row in record["rows"]]
    heads = max((len(row["heads"]) for row in variants), default=0)

    def ppl(entry: Record | None) -> str:
        return DASH if entry is None else spread(entry["ppl"], entry.get("se"))

    columns: Columns = {"variant": lambda row: row["variant"], "extra": lambda row: f"{row['overhead']:.1%}"}
    for i in range(1, heads + 1):
        columns[f"PPL_{i}"] = lambda row, i=i: ppl(row["heads"][i - 1] if i <= len(row["heads"]) else None)
    for m in range(2, heads + 1):
        columns[f"PPL_1:{m}"] = lambda row, m=m: ppl(row["joint"].get(m))
    columns |= {
        "strict tokens/step": lambda row: number(row.get("strict_tokens_per_step")),
        "trunk": lambda row: "frozen" if row.get("frozen") else "trained",
        "tokens": lambda row: f"{row['tokens']:,}",
        "minutes": lambda row: number(row["seconds"] / 60, 1) if row.get("seconds") is not None else DASH,
    }
    note = "All variants on the same data with the same seed; ± one standard error by held-out block."
    table = Table.of("Training variants", columns, variants, note=note)
    facts = [(key.replace("_", " "), _plain(value)) for key, value in (record.get("data") or {}).items()]
    return Section("ablation", "Training ablations", [table], _source(record, facts))


def joint(heat: HeatMap, record: Record) -> Section:
    """The paper's Fig. 11."""
    shown, chosen = len(heat.rows), (heat.chosen[0], heat.chosen[1])
    rows, columns = [visible(text) for text in heat.rows], [visible(text) for text in heat.columns]
    inside = chosen if max(chosen) < shown and any(map(any, heat.masked)) else None
    pictures = []
    for stage, title, meaning in STAGES:
        grid = getattr(heat, stage)
        top = max(map(max, grid))
        label = f"{title}: {meaning}. Largest entry {top:.3g}; {sum(value > 0 for line in grid for value in line)} above 0."
        svg = partial(figures.heat, grid, rows, columns, chosen=inside, top=top)
        pictures.append(Figure(f"joint-{stage}", f"{title}: {meaning}", label, svg))
    pairs = sorted(((i, j) for i in range(shown) for j in range(shown)), key=lambda p: (-heat.masked[p[0]][p[1]], p))
    cells: Columns = {"pair": lambda pair: f"{rows[pair[0]]} {columns[pair[1]]}"}
    for stage, title, _ in STAGES:
        cells[title.lower()] = lambda pair, stage=stage: f"{getattr(heat, stage)[pair[0]][pair[1]]:.4f}"
    numbers = Table.of("The largest entries of the masked joint", cells, pairs[:8], folded=True)
    emits = "two tokens would be emitted" if heat.emits else "the step would back off to one token"
    caption = (
        f"The next two tokens after “{heat.prompt}”: the {shown} likeliest candidates of each head (of {heat.top_k}; the "
        f"picture holds {heat.shown_mass:.0%} of the masked joint). Colour: square root of the probability, blank is 0, "
        f"each picture on its own scale. The cross marks the likeliest pair, {' '.join(map(visible, heat.chosen_text))}. "
        f"{heat.survivors} of {heat.top_k**2:,} pairs stand after Otsu's threshold; at eps_b {heat.eps_b:g} {emits}."
    )
    if not heat.masked_by_table:
        caption += " This model has no co-occurrence tables, so masked and plain are the same."
    facts = [("prompt", heat.prompt), ("eps_b", f"{heat.eps_b:g}"), ("top-k", str(heat.top_k))]
    gallery = Gallery(pictures, caption, numbers)
    return Section("joint", "The joint distribution", [gallery], Source(record["command"], facts))


def visible(text: str, limit: int = 12) -> str:
    """A token with its spaces and line ends shown, cut to `limit` characters."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    shown = "".join(c if c.isprintable() else "�" for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _curve(rows: Sequence[Record], x: str, y: str, error: str = "") -> list[figures.Point]:
    """Points of these fields; `error` is the field of a standard error, of which 1.96 on both sides are the interval."""
    if not error:
        return [figures.Point(row[x], row[y]) for row in rows]
    half = [1.96 * (row.get(error) or 0) for row in rows]
    return [figures.Point(row[x], row[y], row[y] - h, row[y] + h) for row, h in zip(rows, half, strict=True)]


def _source(record: Record, facts: Sequence[tuple[str, str]] = ()) -> Source:
    return Source(record["command"], [("seed", str(record["seed"])), *facts])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
