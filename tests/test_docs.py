"""The documents say what is true of the repository: modules, links, results files, commands; no line above 120 columns."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commandline import Run

from benchmarks import exactness
from dynamo_lm.report.columns import fit

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(p for top in ("docs", "results", "dynamo_lm", "models") for p in (ROOT / top).rglob("*.md"))]
)
GUIDES = [path for path in DOCUMENTS if path.parent in (ROOT, ROOT / "docs") and path.name != "LOG.md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def run(capfd: pytest.CaptureFixture) -> Run:
    return Run(capfd)


# --- width -------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_line_of_a_document_is_above_120_columns(document):
    lines = document.read_text("utf-8").split("\n")
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_prose_is_wrapped_where_no_new_line_looks_like_markup():
    assert fit("- one two - three", 9) == "- one\n  two -\n  three"


def test_a_quotation_stays_a_quotation():
    assert fit("> one two three", 9) == "> one two\n> three"


def test_code_blocks_keep_their_lines():
    assert fit("```\none two three\n```", 8) == "```\none two three\n```"


def test_a_wide_table_becomes_two_that_repeat_the_columns_that_tell_rows_apart():
    table = "| a | b | c |\n| --- | --- | ---: |\n| x | 1 | 10 |\n| x | 2 | 20 |"
    assert fit(table, 20) == table
    assert fit("| key | first | second |\n| --- | --- | ---: |\n| x | 1 | 10 |\n| y | 2 | 20 |", 16) == (
        "| key | first |\n| --- | --- |\n| x | 1 |\n| y | 2 |\n\n| key | second |\n| --- | ---: |\n| x | 10 |\n| y | 20 |"
    )


def test_a_table_with_a_cell_that_is_too_wide_becomes_a_list():
    assert fit("| key | what |\n| --- | --- |\n| x | one two three four |", 16) == "- key: x; what:\n  one two three\n  four"


# --- what is named exists --------------------------------------------------------------------


def test_the_architecture_has_one_sentence_for_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    package = ROOT / "dynamo_lm"
    modules = sorted(p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.name != "__init__.py")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", text, flags=re.M)
    assert sorted(module for module, _ in rows) == modules
    assert [module for module, words in rows if not words.endswith(".") or ". " in words] == []


@pytest.mark.parametrize("document", GUIDES, ids=name)
def test_files_that_a_guide_names_exist(document):
    text = document.read_text("utf-8")
    modules = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|cpp|jinja))`", text)
    assert [path for path in modules if not (ROOT / "dynamo_lm" / path).exists() and not (ROOT / path).exists()] == []
    assert [path for path in re.findall(r"results/[\w/-]+\.(?:jsonl?|md)", text) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", GUIDES, ids=name)
def test_links_lead_to_files_and_headings(document):
    for inline, reference in re.findall(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)", document.read_text("utf-8"), flags=re.M):
        file, _, heading = (inline or reference).partition("#")
        if file.startswith("http"):
            continue
        path = document.parent / file if file else document
        assert path.exists(), file
        titles = re.findall(r"^#+ (.*)", path.read_text("utf-8"), flags=re.M) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, heading


# --- commands ----------------------------------------------------------------------------------


def commands() -> dict[tuple[str, ...], set[str]]:
    """Options that the guides give to every command, of their shell blocks."""
    options: dict[tuple[str, ...], set[str]] = {}
    for document in GUIDES:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text("utf-8"), flags=re.S):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if line.startswith("dynamo-lm "):
                    words = shlex.split(line, comments=True)
                    command = tuple(words[1 : 3 if words[1] == "eval" else 2])
                    options.setdefault(command, set()).update(w for w in words if re.match(r"--?[a-z]", w))
    return options


def test_every_option_of_a_command_in_the_guides_exists(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command, options in commands().items():
        known = re.findall(r"--?[a-z][\w-]*", run(*command, "--help"))
        assert sorted(options - set(known)) == [], command


def test_the_readme_is_below_150_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


def test_the_table_of_exactness_is_what_its_results_say_and_the_promise_holds_in_them():
    lines = exactness.read(ROOT / "results" / "exactness.jsonl")
    assert exactness.table(lines) in (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert {line["gaps"][f"{exactness.STRICT} = {exactness.OWN}"] for line in lines} == {None}
