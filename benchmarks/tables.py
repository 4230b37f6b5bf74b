"""The tables of the documents from the results files: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


def demo_table(results: dict[str, Any]) -> str:
    """Speed-ups with ceiling, baseline and quality."""
    lines = [
        "| decoding | tokens per step (at most) | speed-up (spread) | baseline | same text | log-likelihood | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in results["methods"]:
        speed, base = method["ratio"], method["baseline"] == method["name"]
        faster = "1" if base else f"**{speed['median']:.2f}x** ({speed['min']:.2f}-{speed['max']:.2f})"
        same = method["identical"] and ("yes" if method["identical"]["texts"] == method["identical"]["of"] else "no")
        lines.append(
            f"| {method['name']} | {method['tokens_per_step']:.2f} ({method['ceiling']}) | {faster} "
            f"| {'' if base else method['baseline']} | {same or ''} | {method['log_likelihood']:.2f} "
            f"| {method['distinct_bigrams']:.2f} |"
        )
    return "\n".join(lines)


def steps_table(results: dict[str, Any]) -> str:
    """Tokens per step of strict decoding by n and alpha_c, and of Algorithm 1 by n and eps_b."""
    methods = {method["name"]: method for method in results["methods"]}
    strengths = ("0.0", "0.5", "1.0")
    lines = [f"| strict, greedy | {' | '.join(f'alpha_c {s}' for s in strengths)} |", "|---|---|---|---|"]
    for n in (2, 3, 4):
        row = [f"{methods[f'strict, greedy, n={n}, alpha_c={s}']['tokens_per_step']:.2f}" for s in strengths]
        lines.append(f"| n = {n} | {' | '.join(row)} |")
    lines += ["", "| greedy, n = 4 | tokens per step | log-likelihood | distinct pairs | regret |", "|---|---|---|---|---|"]
    for name, method in methods.items():
        if "tree" in name or "budget" in name:
            kind = name.removeprefix("strict, greedy, ").replace("n=4, ", "").replace(", n=4", "")
            lines.append(
                f"| {kind} | {method['tokens_per_step']:.2f} | {method['log_likelihood']:.2f} "
                f"| {method['distinct_bigrams']:.2f} | {method['regret']:.3f} |"
            )
    sampled = methods["one token, sampled"]
    lines += [
        "",
        f"One token per step, sampled as under `off` (top-k 50, temperature 0.7, repetition penalty 1.1): log-likelihood "
        f"{sampled['log_likelihood']:.2f}, distinct pairs {sampled['distinct_bigrams']:.2f}.",
        "",
        "| off, sampled | tokens per step | log-likelihood | distinct pairs | regret |",
        "|---|---|---|---|---|",
    ]
    for name, method in methods.items():
        if name.startswith("off"):
            lines.append(
                f"| {name.removeprefix('off, ')} | {method['tokens_per_step']:.2f} | {method['log_likelihood']:.2f} "
                f"| {method['distinct_bigrams']:.2f} | {method['regret']:.2f} |"
            )
    return "\n".join(lines)


def bench_table(race: dict[str, Any], *, trained: bool = True) -> str:
    """One race of `dynamo-lm bench`: every ratio with its spread, tokens per step with their ceiling, and the quality."""
    last = "log-likelihood | pairs" if trained else "ms per step"
    lines = [
        f"| method | ratio (spread) | tokens per step | ratio over tokens per step | same texts | {last} |",
        "|---|---|---|---|---|---|" + ("---|" if trained else ""),
    ]
    kind = race["methods"][0]["kind"]
    for method in race["methods"]:
        ratio, same, base = method["ratio"], method["identical"], method["name"] == method["baseline"]
        if method["kind"] != kind:
            lines.append("|" + " |" * (7 if trained else 6))
        kind = method["kind"]
        ceiling = f" of {method['ceiling']}" if method["ceiling"] not in (None, 1) else ""
        arrives = f" of {method['efficiency_ceiling']:.2f}" if method.get("efficiency_ceiling") else ""
        quality = (
            f"{method['log_likelihood']:.2f} | {method['distinct_bigrams']:.2f}"
            if trained
            else f"{1000 * method['step_seconds']:.1f}"
        )
        alike = "" if same is None else f"{same['texts']}/{same['of']}"
        faster = "baseline" if base else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        lines.append(
            f"| {'**' if base else ''}{method['name']}{'**' if base else ''}{'' if method['lossless'] else ' *'} | {faster} "
            f"| {method['tokens_per_step']:.2f}{ceiling} | {method['efficiency']:.2f}{arrives} "
            f"| {alike} | {quality} |"
        )
    floor = race["floor"]
    lines.append(f"| {floor['name']} | {floor['ratio']:.2f} | | | | {'| ' if trained else ''}|")
    return "\n".join(lines)


def groups_table(race: dict[str, Any]) -> str:
    """A race over a benchmark's groups: each method's ratio and tokens per step in each of them."""
    groups = sorted(race["methods"][0]["groups"])
    lines = [f"| method | all | {' | '.join(groups)} |", "|---|---|" + "---|" * len(groups)]
    for method in race["methods"]:
        ratio = method["ratio"]
        cells = [
            f"{each['ratio']['median']:.2f} at {each['tokens_per_step']:.2f}" for _, each in sorted(method["groups"].items())
        ]
        every = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) at {method['tokens_per_step']:.2f}"
        lines.append(f"| {method['name']}{'' if method['lossless'] else ' *'} | {every} | {' | '.join(cells)} |")
    return "\n".join(lines)


def batches_table(races: list[dict[str, Any]]) -> str:
    """The same methods at several batch sizes, and what the largest writes over what the smallest does."""
    sizes = [race["batch"] for race in races]
    lines = [
        f"| method | tokens per step | {' | '.join(f'batch {size}' for size in sizes)} | tokens a second, last over first |",
        "|---|---|" + "---|" * (len(sizes) + 1),
    ]
    by_race = [{method["name"]: method for method in race["methods"]} for race in races]
    for name, method in by_race[-1].items():
        cells = []
        for methods in by_race:
            each = methods[name]["ratio"]
            spread = f"{each['median']:.2f} ({each['min']:.2f}-{each['max']:.2f})"
            cells.append("baseline" if methods[name]["baseline"] == name else spread)
        most = f" of {method['ceiling']}" if method["ceiling"] not in (None, 1) else ""
        gain = method["tokens_per_second"]["median"] / by_race[0][name]["tokens_per_second"]["median"]
        star = "" if method["lossless"] else " *"
        lines.append(f"| {name}{star} | {method['tokens_per_step']:.2f}{most} | {' | '.join(cells)} | {gain:.1f} |")
    return "\n".join(lines)


def contexts_table(races: list[dict[str, Any]]) -> str:
    """The same methods after short and long contexts."""
    header = [f"{race['context']}: ratio (spread) | tokens per step | log-likelihood" for race in races]
    lines = [f"| method | {' | '.join(header)} |", "|---|" + "---|" * 3 * len(races)]
    by_race = [{method["name"]: method for method in race["methods"]} for race in races]
    for name, method in by_race[-1].items():
        cells = []
        for each in (methods[name] for methods in by_race):
            ratio = each["ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
            faster = "baseline" if each["baseline"] == name else spread
            cells.append(f"{faster} | {each['tokens_per_step']:.2f} | {each['log_likelihood']:.2f}")
        lines.append(f"| {name}{'' if method['lossless'] else ' *'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares_table(profiles: dict[str, dict[str, Any]]) -> str:
    """Where a step's time goes, by method."""
    parts = list(dict.fromkeys(part for profile in profiles.values() for part in profile["shares"]))
    lines = [f"| method | ms per step | {' | '.join(parts)} |", "|---|---|" + "---|" * len(parts)]
    for name, profile in profiles.items():
        shares = [f"{100 * profile['shares'].get(part, 0):.1f} %" for part in parts]
        lines.append(f"| {name} | {1000 * profile['step_seconds']:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def quality_table(results: dict[str, Any], dials: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)) -> str:
    """Quality of the text at some settings: both win rates of the paper's method, and strict sampling."""
    lines = [
        f"| `eps_b` | tokens per step (of {results['ceiling']}) | speed-up | win rate, base as it is "
        "| win rate, base at the same diversity | that temperature |",
        "|---|---|---|---|---|---|",
    ]
    points = [(f"{p['eps_b']:g}", p) for p in results["methods"]["mask+Otsu+blur"]["points"] if p["eps_b"] in dials]
    for name, point in [*points, ("strict", results["methods"]["strict"]["points"][0])]:
        speed, matched = point["speed_up"], point["matched"]
        lines.append(
            f"| {name} | {point['tokens_per_step']:.2f} | {speed['median']:.2f}x ({speed['low']:.2f}-{speed['high']:.2f}) "
            f"| {_rate(point['plain'])} | {_rate(matched)} | {matched['temperature']:.2f} |"
        )
    return "\n".join(lines)


def memory_table(results: dict[str, Any]) -> str:
    """Memory of a rank by the dry run and as measured, both ranks."""
    lines = [f"| {results['ranks']} ranks | estimated | measured, each rank |", "|---|---|---|"]
    for setting in results["settings"]:
        measured = " and ".join(f"{value / 1e9:.1f}" for value in setting["measured"])
        lines.append(f"| `{setting['options']}` | {setting['estimated']['total'] / 1e9:.1f} GB | {measured} GB |")
    return "\n".join(lines)


def tokenizing_table(results: list[dict[str, Any]]) -> str:
    """Tokens a processor second, and processor seconds to resume."""
    lines = ["| tokenizer | into the run folder | streamed | to resume | from the beginning |", "|---|---|---|---|---|"]
    for row in results:
        lines.append(
            f"| {row['tokenizer']} | {row['stored_per_second']:,} tokens a second | {row['streamed_per_second']:,} "
            f"| {row['resumed_seconds']:.1f} s | {row['from_the_beginning_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def _rate(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['win_rate']:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    print(demo_table(json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))), end="\n\n")
    print(steps_table(json.loads((RESULTS / "story.json").read_text(encoding="utf-8"))))
    print(
        "", quality_table(json.loads((RESULTS / "story" / "completion-openings.json").read_text(encoding="utf-8"))), sep="\n"
    )
    for file in sorted(RESULTS.glob("bench*/bench.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for race in record["races"]:
            print(f"\n{file.parent.name}: {race['context']} context, batch {race['batch']}\n")
            print(bench_table(race, trained=race["methods"][0]["log_likelihood"] is not None))
            if len(race["methods"][0]["groups"]) > 1:
                print("", groups_table(race), sep="\n")
        if len(record["races"]) > 1:
            together = batches_table if record["races"][-1]["batch"] > 1 else contexts_table
            print("", together(record["races"]), sep="\n")
        if record.get("profiles"):
            print("", shares_table(record["profiles"]), sep="\n")
    scaling = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    print("", memory_table(scaling["memory"]), "", tokenizing_table(scaling["tokenizing"]), sep="\n")
