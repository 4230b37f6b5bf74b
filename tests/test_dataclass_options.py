"""Options declared as dataclasses: what typer sees of them, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from dynamo_lm.cli.dataclass_options import dataclass_options


@dataclass(frozen=True, kw_only=True)
class Library:
    clip: Annotated[float, "Largest norm."] = 1.0
    keep: int = 2  # not an option


@dataclass(frozen=True, kw_only=True)
class Learning(Library):
    PANEL: ClassVar[str] = "How it learns"

    seed: Annotated[int, typer.Option("--seed", "-s", help="Random numbers.", min=0)] = 0
    dry_run: Annotated[bool, "Train nothing."] = False


@dataclass(frozen=True, kw_only=True)
class Text:
    data: Annotated[list[str] | None, "Files."] = None
    text_field: Annotated[str, "Name of a field."]


SLOW = Learning(clip=0.5, keep=9)


def carry_out(*arguments: str, command=None):
    results: list[tuple] = []

    @dataclass_options
    def train(
        model: Annotated[str, typer.Argument()],
        text: Text,
        learning: Learning,
        *,
        json: Annotated[bool, "Print JSON."] = False,
    ) -> None:
        results.append((model, text, learning, json))

    @dataclass_options
    def slow(learning: Learning = SLOW) -> None:
        results.append((learning,))

    app = typer.Typer()
    app.command()({"train": train, "slow": slow}[command or "train"])
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "150"})
    return outcome, *results


def test_fields_are_options_and_the_command_gets_dataclasses():
    arguments = ("m", "--data", "a", "--data", "b", "--text-field", "story", "--clip", "2", "-s", "3", "--dry-run", "--json")
    outcome, (model, text, learning, json) = carry_out(*arguments)
    assert (model, json) == ("m", True), outcome.output
    assert text == Text(data=["a", "b"], text_field="story")
    assert learning == Learning(clip=2.0, seed=3, dry_run=True, keep=2)
    assert carry_out("m", "--text-field", "x")[1][2] == Learning()


def test_a_default_instance_replaces_the_defaults_of_the_fields():
    assert carry_out(command="slow")[1] == (SLOW,)
    assert carry_out("--clip", "3", command="slow")[1] == (Learning(clip=3.0, keep=9),)


def test_the_help_has_texts_defaults_and_headings():
    text = carry_out("--help")[0].output
    for words in ("How it learns", "Largest norm.", "[default: 1.0]", "--seed", "-s", "[x>=0]", "--json"):
        assert words in text
    assert "--no-dry-run" not in text and "--keep" not in text


@pytest.mark.parametrize("arguments", [("m",), ("m", "--text-field", "x", "--seed", "-1"), ("m", "--keep", "1")])
def test_wrong_usage_is_refused(arguments):
    outcome, *results = carry_out(*arguments)
    assert outcome.exit_code == 2 and results == []
