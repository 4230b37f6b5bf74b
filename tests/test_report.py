"""The report: what is there is shown, what is not is named, and nothing that a model wrote becomes markup."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.cli.main import main
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding.joint_heatmap import grids, heatmap
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.evaluation.completion.generate import BASELINE
from dynamo_lm.report import assemble, render, samples
from dynamo_lm.report.document import Table
from dynamo_lm.report.sections import visible
from dynamo_lm.sampling.options import Algorithm1

METHODS = {"mask+Otsu+blur": 2.6, "mask+Otsu": 2.4, "mask": 2.2, "mask^0.5+Otsu+blur": 1.9, "Otsu+blur": 1.2, "strict": None}
PROMPTS = ["Once upon a time, there was", "He wanted to play, but", "Wow! I can't believe that"]
EVIL = 'a <script>alert("x")</script> *b* | _c_ `d` [e](f) & more'


@pytest.fixture(scope="module")
def story():
    return DynaMoForCausalLM.from_pretrained(str(bundled())).eval(), AutoTokenizer.from_pretrained(bundled())


@pytest.fixture(scope="module")
def measured(story, tmp_path_factory):
    """A full folder that no test writes into."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    write_results(folder, *story)
    return folder


@pytest.fixture
def full(measured, tmp_path):
    """A full folder of one's own."""
    return Path(shutil.copytree(measured, tmp_path / "results"))


@cache
def head(model) -> dict:
    return results_file.begin("any", [], model, "story", seed=7, settings={})


def write_results(
    folder: Path, model, tokenizer, *, useful: bool = True, kinds: set[str] | None = None, texts: bool = True
) -> None:
    """A folder as the `eval` commands leave it; numbers invented, texts the model's own."""
    made = {
        "completion": completion(useful),
        "perplexity": perplexity(),
        "calibration": calibration(),
        "nlu": nlu(),
        "ablation": ablation(),
    }
    for kind, own in made.items():
        if kinds is not None and kind not in kinds:
            continue
        command = ["calibrate" if kind == "calibration" else f"eval {kind}", "story", "--out", "runs/eval-story"]
        results_file.save(folder, head(model) | {"kind": kind, "command": f"dynamo-lm {' '.join(command)}"} | own)
    if texts and kinds is None:
        write_texts(folder / "completion.texts.jsonl", model, tokenizer)


def write_texts(file: Path, model, tokenizer) -> None:
    arms = [{"name": "base", "role": "base", "method": "base", "arguments": {}, "eps_b": None, "temperature": 0.7}]
    arms += [{"name": "strict", "role": "candidate", "method": "strict", "arguments": {}, "eps_b": None, "temperature": 0.7}]
    for dial in (0.0, 0.4, 0.7):
        arms.append({"name": f"mask+Otsu+blur, eps_b {dial:g}", "role": "candidate", "method": "mask+Otsu+blur"})
        arms[-1] |= {"eps_b": dial, "temperature": None, "arguments": {}}
    lines = [{"identity": results_file.identity(model), "prompts": PROMPTS, "max_new_tokens": 30, "seed": 7, "arms": arms}]
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for arm in arms:
            how = {"verify": "strict", "num_heads": 1} if arm["method"] == "base" else {"verify": "strict"}
            if arm["eps_b"] is not None:
                how = {"verify": "off", "eps_b": arm["eps_b"]}
            out = model.generate(
                ids,
                max_new_tokens=10,
                do_sample=True,
                top_k=50,
                temperature=0.7,
                seed=number,
                return_dict_in_generate=True,
                **how,
            )
            tokens = out.sequences[0, ids.shape[1] :].tolist()
            whole = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
            line = {"arm": arm["name"], "prompt": number, "seed": 0, "tokens": tokens, "text": whole[len(prompt) :]}
            lines.append(line | {"step_sizes": out.statistics[0].step_sizes, "seconds": 0.1})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def completion(useful: bool) -> dict:
    methods = {}
    for at, (name, same) in enumerate(METHODS.items()):
        dials = [0.0, 0.4, 0.7, 1.0] if same else [None]
        points = [point(name, dial, same, at) for dial in dials]
        methods[name] = {
            "points": points,
            "same_quality": {"plain": same_quality(same and same + 0.9), "matched": same_quality(same)},
        }
    checks = {"wins": 98, "ties": 0, "losses": 2, "share": 0.98, "interval": [0.93, 1.0]}
    level = {"wins": 47, "ties": 4, "losses": 49, "share": 0.49, "interval": [0.39, 0.59]}
    reason = "it tells text from shuffled words and is even between samples" if useful else "it prefers shuffled words"
    return {
        "prompts": PROMPTS,
        "seeds": 10,
        "max_new_tokens": 100,
        "ceiling": 4,
        "baseline": BASELINE,
        "judge": {
            "name": "log-likelihood under Gemma-3-270M",
            "caveat": "It sees how likely text is to another model and nothing of truth, plot or taste",
            "sanity": {"shuffled": checks, "same": level, "useful": useful, "reason": reason},
        },
        "ladder": [
            {"temperature": t, "log_likelihood_per_byte": -0.28 - 0.5 * t, "diversity": diversity(0.7 + 0.25 * t)}
            for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
        ],
        "methods": methods,
    }


def point(name: str, dial: float | None, same: float | None, at: int) -> dict:
    speed = 2.0 if dial is None else 1 + 2.9 * (1 - dial) ** 1.3
    one = 0.0 if dial is None else dial**1.5
    rates = [rate(1.0 if same is None else 2 ** ((target - speed) * 1.1)) for target in ((same or 2) + 0.9, same or 2)]
    return {
        "eps_b": dial,
        "tokens_per_step": round(speed, 3),
        "tokens_per_step_interval": [speed - 0.06, speed + 0.06],
        "speed_up": {"median": 0.75 * speed, "low": 0.7 * speed, "high": 0.8 * speed},
        "shares": [one, (1 - one) * 0.15, (1 - one) * 0.25, (1 - one) * 0.6],
        "regret": 0.2 + 0.1 * at,
        "log_likelihood_per_byte": -0.5 - 0.03 * at - 0.02 * speed,
        "score": None,
        "diversity": diversity(0.87 - 0.005 * speed),
        "plain": rates[0],
        "matched": rates[1] | {"temperature": 0.45},
    }


def rate(value: float) -> dict:
    wins = round(100 * value / (1 + value))
    return {"wins": wins, "ties": 0, "losses": 100 - wins, "win_rate": value, "interval": [value / 1.5, value * 1.5]}


def diversity(value: float) -> dict:
    return {
        "distinct_1": value - 0.2,
        "distinct_2": value,
        "distinct_3": value + 0.03,
        "pooled_distinct_2": value - 0.3,
        "self_bleu": 0.2,
        "repetition": 1 - value,
        "mauve": None,
    }


def same_quality(value: float | None) -> dict:
    estimate = None if value is None else min(value, 4.0)
    interval = None if value is None else [value - 0.2, value + 0.25]
    found = {"estimate": estimate, "interval": interval, "theoretical": (value or 0) > 3.2, "capped": (value or 0) > 4}
    clock = found | {"estimate": estimate and 0.7 * estimate, "interval": interval and [0.7 * v for v in interval]}
    x = [1 + 0.1 * i for i in range(31)]
    y = [2 ** (((value or 2) - v) * 1.1) for v in x]
    band = {"x": x, "win_rate": y, "low": [v / 1.2 for v in y], "high": [v * 1.2 for v in y]}
    note = "" if value is not None else "too few points for a regression"
    return {"tokens_per_step": found, "wall_clock": clock, "band": band if value is not None else None, "note": note}


def perplexity() -> dict:
    dynamic = [
        {
            "eps_b": e / 10,
            "ppl": 10 + (30 if masked else 60) * (1 - e / 10) ** 1.5,
            "se": 0.4,
            "tokens_per_step": 1 + 2.8 * (1 - e / 10) ** (1.2 if masked else 2.5),
            "shares": [(e / 10) ** 2, (1 - (e / 10) ** 2) * 0.2, (1 - (e / 10) ** 2) * 0.2, (1 - (e / 10) ** 2) * 0.6],
            "masked": masked,
        }
        for masked in (True, False)
        for e in range(11)
    ]
    return {
        "text": {"sources": ["stories/heldout.jsonl"], "documents": 500, "tokens": 98304, "bytes": 431022},
        "window": 1024,
        "stride": 512,
        "heads": [
            {"head": i, "ppl": p, "se": p / 90, "nll": math.log(p), "tokens": 98304 - 500 * i}
            for i, p in enumerate((10.01, 37.67, 81.99, 126.64), start=1)
        ],
        "joint": [
            {"heads": 2, "ppl": 19.42, "se": 0.2, "masked_ppl": 14.2, "masked_se": 0.2},
            {"heads": 3, "ppl": 31.4, "se": 0.3, "masked_ppl": None, "masked_se": None},
        ],
        "dynamic": dynamic,
        "base": {"ppl": 10.01},
        "ceiling": 4,
    }


def calibration() -> dict:
    curve = [
        {
            "eps_b": e / 10,
            "tokens_per_step": 1 + 2.9 * (1 - e / 10),
            "value": 1.3 - 0.3 * e / 10,
            "low": None,
            "high": 1.33 - 0.3 * e / 10,
            "passes": e >= 4,
        }
        for e in range(11)
    ]
    return {
        "criterion": {"name": "ppl", "limit": 1.21},
        "curve": curve,
        "chosen": {"eps_b": 0.4, "tokens_per_step": 2.74},
    }


def nlu() -> dict:
    value = {"acc": {"value": 0.531, "stderr": 0.02}}
    arms = [{"arm": "base", "accuracy": 0.1, "stderr": 0.01, "tokens_per_step": 1.0, "speed_up": 1.0, "ceiling": 1}]
    arms += [{"arm": "eps_b 0.4", "accuracy": 0.09, "stderr": 0.01, "tokens_per_step": 2.5, "speed_up": 1.8, "ceiling": 4}]
    tasks = {task: {"base": value, "dynamo": value, "samples": 500} for task in ("piqa", "blimp", "winogrande")}
    return {"tasks": tasks, "generation": {"gsm8k": arms}}


def ablation() -> dict:
    rows = [
        {
            "variant": name,
            "configuration": {},
            "extra_parameters": 444864,
            "overhead": 0.0563,
            "tokens": 1_000_000,
            "frozen": name == "T2-H",
            "heads": [{"ppl": 10.1, "se": 0.1}, {"ppl": 40.2, "se": 0.4}, {"ppl": 90.0, "se": None}][
                : 3 if name == "T3" else 2
            ],
            "joint": [{"heads": 2, "ppl": 20.1, "se": 0.2}],
            "seconds": 321.0,
            "strict_tokens_per_step": 1.61,
        }
        for name in ("T2", "T2 (C)", "T2-H", "T3")
    ]
    return {"data": {"sources": ["stories"], "tokens": 1_000_000}, "rows": rows}


@pytest.fixture(scope="module")
def explained(story, measured, tmp_path_factory):
    """The page of a full folder with what needs the model."""
    folder = tmp_path_factory.mktemp("explained") / "results"
    shutil.copytree(measured, folder)
    assemble.look_closer(folder, *story, "story", command=["report"], prompt=None)
    return assemble.assemble(folder)


@pytest.fixture(scope="module")
def page(measured):
    """The page of a full folder."""
    return assemble.assemble(measured)


class Parser(html.parser.HTMLParser):
    """Collects tags, ids and whatever refers to somewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)


def test_a_full_folder_gives_every_section_and_only_names_what_needs_the_model(page, measured):
    assert [section.id for section in page.sections] == [
        "quality", "decoding", "steps", "diversity", "calibration", "perplexity", "nlu", "ablation", "texts"
    ]  # fmt: skip
    assert [command for _, command in page.missing] == [
        f"dynamo-lm report {measured} --model story --prompt TEXT",
        f"dynamo-lm report {measured} --model story",
    ]


def test_a_page_is_titled_by_the_models_name(story, tmp_path, monkeypatch):
    (tmp_path / "tiny-chat/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny-chat/model")
    names = ["story", "org/tiny-chat", str(tmp_path / "tiny-chat/model"), f"{tmp_path}/tiny-chat/model/", "."]
    assert [results_file.model_name(name) for name in names] == ["story", *["tiny-chat"] * 4]
    entry = results_file.begin("perplexity", [], story[0], names[2], seed=7, settings={}) | perplexity()
    results_file.save(tmp_path / "results", entry)
    page = assemble.assemble(tmp_path / "results")
    assert page.title == "tiny-chat, measured"
    assert f"dynamo-lm eval nlu {names[2]} --out {tmp_path / 'results'}" in [command for _, command in page.missing]


def test_the_page_begins_with_the_matched_speed_up_and_the_plain_one_is_smaller(page):
    first, second, *rest = page.headlines
    assert (first.value, first.unit, first.small) == (
        "2.60",
        "tokens per step, against the base at matched diversity",
        False,
    )
    assert first.detail == "95 % interval 2.40 to 2.85"
    assert (second.value, second.small) == ("1.82x", False)
    assert [(h.value, h.small) for h in rest] == [("3.50", True), ("2.45x", True)]
    assert "extrapolated" in rest[0].detail


def test_a_useless_judge_leaves_a_banner_and_no_win_rate_anywhere(story, tmp_path):
    write_results(tmp_path, *story, useful=False, texts=False)
    page = assemble.assemble(tmp_path)
    text = render.html(replace(page, sections=page.sections[:1]))
    assert "This judge is useless here" in text and "it prefers shuffled words." in text
    assert not any(figure.name.startswith("win") for figure in page.figures())
    assert "win rate, matched" not in render.markdown(page) and "Same-quality speed-up" not in text
    assert "2.60" not in [headline.value for headline in page.headlines]


def test_where_too_few_prompts_gave_an_interval_there_is_none(full):
    file = full / "completion.json"
    found = json.loads(file.read_text())
    for method in found["methods"].values():
        for each in method["points"]:
            each |= {"tokens_per_step_interval": None, "speed_up": {"median": 1.234, "low": None, "high": None}}
    file.write_text(json.dumps(found))
    assert "| 1.23x |" in render.markdown(assemble.assemble(full))


@pytest.mark.parametrize("kind", ["completion", "perplexity", "calibration", "nlu", "ablation"])
def test_every_part_is_optional_and_a_missing_one_is_named_with_its_command(story, tmp_path, kind):
    write_results(tmp_path, *story, kinds={kind})
    page = assemble.assemble(tmp_path)
    measured = {"completion", "perplexity", "calibration", "nlu", "ablation"} - {kind}
    commands = " ".join(command for _, command in page.missing)
    assert all(f" {kind.replace('calibration', 'calibrate')} story" in commands for kind in measured)
    assert "# story, measured" in render.markdown(page)


def test_the_page_is_one_file_without_scripts_whose_ids_are_unique_and_whose_links_stay_inside(explained):
    parsed = Parser(render.html(explained))
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link[0] == "#" and link[1:] in parsed.ids for link in parsed.links)


def test_the_same_results_give_the_same_bytes(page, measured):
    first, second = page, assemble.assemble(measured)
    assert render.markdown(first) == render.markdown(second)
    assert first.figures()[0].svg == second.figures()[0].svg and "<dc:date>" not in first.figures()[0].svg


def test_what_a_model_wrote_never_becomes_markup(story, full):
    lines = (full / "completion.texts.jsonl").read_text().splitlines()
    entry = json.loads(lines[1]) | {"text": EVIL}
    (full / "completion.texts.jsonl").write_text("\n".join([lines[0], json.dumps(entry)]) + "\n")
    page = assemble.assemble(full, title="<b>bold</b>")
    page = replace(page, sections=page.sections[-1:])  # without figures
    text = render.html(page)
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>bold" not in text
    plain = render.markdown(page)
    assert "<script" not in plain and r"\*b\* &#124; \_c\_ \`d\` \[e\](f) &amp; more" in plain


def test_markdown_links_to_the_figures_that_were_written_beside_it(explained, tmp_path):
    page = explained
    render.write(page, html_file=tmp_path / "a" / "page.html", markdown_file=tmp_path / "b" / "page.md")
    links = re.findall(r"\]\((figures/[^)]*)\)", (tmp_path / "b" / "page.md").read_text())
    assert len(links) == len(page.figures()) > 8
    assert all((tmp_path / "b" / link).read_text().startswith("<?xml") for link in links)
    assert not [file for file in tmp_path.rglob(".*")]


def test_the_command_writes_both_files_and_says_where(story, tmp_path, capsys):
    write_results(tmp_path, *story, kinds={"nlu"})
    assert main(["report", str(tmp_path), "--title", "My model"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.html"), str(tmp_path / "report.md")]
    assert "<title>My model</title>" in (tmp_path / "report.html").read_text()


def test_what_needs_the_model_is_kept_for_later_runs(story, tmp_path, capsys):
    write_results(tmp_path, *story, kinds={"nlu"})
    assert main(["report", str(tmp_path), "--model", "story", "--prompt", "The fox", "--threads", "1"]) == 0
    first = (tmp_path / "report.html").read_text()
    assert 'id="joint"' in first and "after “The fox”" in first
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == first


def test_steps_are_shown_only_where_their_pieces_spell_the_text(story, full):
    assemble.look_closer(full, *story, "story", command=["report"], prompt="The fox")
    page = assemble.assemble(full)
    texts = [text for block in page.sections[-1].blocks for text in block.texts]
    assert len(texts) == 3 * 5 and all(text.steps for text in texts) and not page.missing
    for text in texts:
        assert "".join(step.text for step in text.steps) == text.text
    samples = results_file.load(full, "samples")
    key = next(iter(samples["pieces"]))
    samples["pieces"][key][0][0] += "!"
    results_file.save(full, samples)
    again = [text.steps is None for block in assemble.assemble(full).sections[-1].blocks for text in block.texts]
    assert again.count(True) == 1


def test_a_step_that_ends_within_a_character_is_joined_with_the_next(story):
    _, tokenizer = story
    tokens = tokenizer("a 🦊 b")["input_ids"]
    text = tokenizer.decode(tokens)
    pieces = samples.split(text, tokens, [1] * len(tokens), tokenizer)
    assert "".join(piece for piece, _ in pieces) == text and sum(size for _, size in pieces) == len(tokens)
    assert not any("\ufffd" in piece for piece, _ in pieces)


def test_the_thresholds_picture_agrees_with_the_slow_reference():
    counts = torch.Generator().manual_seed(3)
    table = count([torch.randint(0, 9, (400,), generator=counts).numpy()], order=2, vocab_size=9)
    logits = torch.randn(2, 9, generator=counts) * 2
    options = Algorithm1(eps_b=0.2, top_k=5)
    heads, found, emits = grids(logits, table, options, [1, 2])
    slow = [reference.candidates(row, 5, 0.7) for row in logits.tolist()]
    joint = reference.joint_grid(slow, table, 1.0)
    for name, expected in (
        ("plain", reference.joint_grid(slow, None, 0.0)),
        ("masked", joint),
        ("blurred", reference.blur(joint)),
    ):
        np.testing.assert_allclose(found[name], [[expected[i, j] for j in range(5)] for i in range(5)], atol=1e-12)
    alone = Algorithm1(eps_b=0.0, top_k=5, repetition_penalty=1.0)
    left = reference.survivors(joint, slow, [], alone)
    assert {(int(i), int(j)) for i, j in zip(*np.nonzero(found["thresholded"]), strict=True)} == set(left)
    assert emits == bool(reference.survivors(joint, slow, [1, 2], options))
    assert heads.ids[0].tolist() == [token for token, _ in slow[0]]


def test_the_joint_of_a_prompt_shows_its_likeliest_pair(story):
    found = heatmap(*story, "Once upon a time, there was a little girl named", eps_b=0.5)
    assert found.chosen_text == [found.rows[found.chosen[0]], found.columns[found.chosen[1]]] == [" Lily", "."]
    assert len(found.rows) == len(found.columns) == len(found.masked) == 12
    assert found.masked[0][0] == max(map(max, found.masked)) == found.thresholded[0][0]
    assert found.emits and not heatmap(*story, "Once upon a time, there was a little girl named", eps_b=1.0).emits
    assert 0 < found.survivors < 20 and 0.9 < found.shown_mass <= 1


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_escaped_text_has_no_markup_and_stays_on_one_line(text):
    escaped = render.escape(text)
    assert not re.search(r"[<>\n\r]", escaped)
    assert not re.search(r"(?<!\\)(?:\\\\)*[*_`\[\]|~$]", re.sub(r"\\[^\w\s]", "", escaped))
    assert len(visible(text)) <= 12 and "\n" not in visible(text)


def test_only_what_begins_a_list_or_heading_is_escaped_at_the_start_of_a_line():
    starts = {"1. one": r"1\. one", "- a": r"\- a", "---": r"\---", "2.60": "2.60", "-0.5": "-0.5", "# a": r"\# a"}
    assert {text: render.escape(text) for text in starts} == starts


def test_every_row_of_every_table_has_a_cell_for_every_column(explained):
    blocks = [block for section in explained.sections for block in section.blocks]
    tables = [getattr(block, "numbers", None) or block for block in blocks]
    tables = [table for table in tables if isinstance(table, Table)]
    assert len(tables) > 8 and all(len(row) == len(table.columns) for table in tables for row in table.rows)


def corrupt(folder: Path, kind: str, change) -> None:
    entry = json.loads((folder / f"{kind}.json").read_text())
    change(entry)
    (folder / f"{kind}.json").write_text(json.dumps(entry))


def test_bad_results_are_refused_in_one_sentence(full, tmp_path, capsys):
    cases = [
        ([str(tmp_path / "nowhere")], "is not a folder"),
        ([str(full / "nlu.json")], "is not a folder"),
        ([str(full), "--prompt", "x"], "name it with --model"),
        ([str(full), "--model", "story", "--prompt", " "], "--prompt is empty"),
        ([str(full), "--html", str(full)], "is a folder"),
        ([str(full), "--html", str(full / "nlu.json" / "x.html")], "cannot be made"),
        ([str(full), "--html", "x", "--markdown", "x"], "the same file"),
    ]
    (tmp_path / "empty").mkdir()
    cases.append(([str(tmp_path / "empty")], "has no results"))
    for arguments, said in cases:
        assert main(["report", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_damaged_records_are_named(full, capsys):
    corrupt(full, "calibration", lambda entry: entry.pop("curve"))
    assert main(["report", str(full)]) == 2
    assert "calibration.json\" has no usable 'curve'" in capsys.readouterr().err
    (full / "calibration.json").write_text("{")
    assert main(["report", str(full)]) == 2
    assert "is not valid JSON" in capsys.readouterr().err
    (full / "calibration.json").unlink()
    corrupt(full, "nlu", lambda entry: entry["model"].update(identity="0" * 16))
    assert main(["report", str(full)]) == 2
    assert "mixes results of different models" in capsys.readouterr().err
    (full / "nlu.json").unlink()
    with (full / "completion.texts.jsonl").open("a") as stream:
        stream.write("{}\n")
    assert main(["report", str(full)]) == 2
    assert "is damaged in line 17" in capsys.readouterr().err


def test_the_results_of_another_model_are_not_explained_with_this_one(story, full):
    for file in full.glob("*.json"):
        corrupt(full, file.stem, lambda entry: entry["model"].update(identity="0" * 16))
    with pytest.raises(InputError, match="is not the model that was measured"):
        assemble.look_closer(full, *story, "story", command=["report"], prompt=None)
    assert not (full / "heatmap.json").exists()


def test_a_run_without_a_judge_is_shown_without_win_rates(story, tmp_path):
    write_results(tmp_path, *story, kinds={"completion"})
    file = tmp_path / "completion.json"
    entry = json.loads(file.read_text())
    entry["judge"] = None
    for method in entry["methods"].values():
        method["same_quality"] = None
        for point in method["points"]:
            point["plain"] = point["matched"] = None
    file.write_text(json.dumps(entry))
    page = render.markdown(assemble.assemble(tmp_path))
    assert "No judge was used" in page and "useless" not in page and "win rate, matched" not in page
