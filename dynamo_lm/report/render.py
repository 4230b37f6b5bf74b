"""A page as files: one HTML file that needs nothing else, and Markdown with its figures beside it.

The same page gives the same bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from dynamo_lm.errors import InputError
from dynamo_lm.files import write_text
from dynamo_lm.report import figures
from dynamo_lm.report.columns import fit
from dynamo_lm.report.document import Page


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
